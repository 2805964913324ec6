"""Choosing what a model can do without, and removing it: heads, neurons, layers, channels, weights, tokens."""
