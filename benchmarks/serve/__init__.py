"""Measures EvoSpec's speed through HTTP against other servers'."""
