"""Tools: how a model writes calls, the grammar that holds it to that, and how answers are taken apart again."""
