"""Speculative decoding: who drafts, and how many tokens."""
