"""One model on several devices or processes: each rank has its share of the weights and of the KV cache."""
