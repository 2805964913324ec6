"""The pass `prune-vocabulary`: its choice of token ids, and the tokenizer for those that stay."""
