"""PyTorch's operators and ours, called one after another."""
