"""Measures acceptance and speed by draft vocabulary."""
