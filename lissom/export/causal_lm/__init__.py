"""Causal language models on the way to a KV cache: their calls are checked, masks become patterns, positions become inputs."""
