"""Measures whether answers stay right and all recovers when processes and shared memory are hurt."""
