"""Measures how often drafts are accepted by coupled noise, rejection sampling and a greedy draft."""
