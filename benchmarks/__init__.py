"""Benchmarks: a package or module each, run as ``python -m benchmarks.NAME``; see docs/measuring.md."""
