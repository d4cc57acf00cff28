"""The prompts of the benchmarks, and those that drafts learn from."""
