"""Weights as checkpoint files store them, such as blocks of GGUF files, kept next to a model's floating-point weights."""
