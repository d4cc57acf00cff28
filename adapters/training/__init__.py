"""Offline: let the target generate answers, count their tokens for draft vocabularies, and train a draft on them."""
