"""Measures what the worker's options gain, on recorded answers instead of servers."""
