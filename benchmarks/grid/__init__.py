"""Every way to draft, on every kind of prompt, at every load: ``python -m benchmarks.grid``."""
