"""Draft vocabularies that follow the session: tails, n-grams and the prior on the draft's logits."""
