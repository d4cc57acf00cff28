"""Speculative decoding: what proposes tokens, and how many are worth proposing."""
