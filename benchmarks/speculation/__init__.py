"""Measures speed with speculation against none in the same engine, and acceptance of drafts."""
