"""Quantization: Q/DQ nodes, passes that reduce their error, and exact folding into stored integers."""
