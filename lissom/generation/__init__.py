"""Generation: causal language models compiled with their KV cache, for transformers' `generate` and for your own
loops."""
