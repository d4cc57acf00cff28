"""Measures what other tenants notice while one client, with a key or without, does its worst to a server."""
