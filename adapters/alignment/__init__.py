"""The online worker: records → replay → updates → score → publish → watch. docs/alignment.md describes it."""
