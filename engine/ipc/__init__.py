"""What the engine and the adapters worker share: draft weights, draft input features, and the token log."""
