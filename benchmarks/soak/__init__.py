"""Measures whether a server bears many streams, clients that go away, and hours' worth of mixed load."""
