"""Capture of language models of transformers with their KV cache as the state of the program."""
