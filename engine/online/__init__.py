"""What the engine and the adapters worker tell each other: verified drafts, features, weights."""
