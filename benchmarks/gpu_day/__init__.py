"""The first half hour with a GPU: ``make gpu-day``."""
