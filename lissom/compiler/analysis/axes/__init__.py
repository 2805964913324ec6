"""Which indices of which tensors belong together, and which of them contribute nothing."""
