"""A baseline of online alignment: all weights of the draft are trained, for everybody at once."""
