"""Drafts that are shipped: one directory a model, found by ``engine.speculation.build``."""
