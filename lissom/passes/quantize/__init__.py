"""Quantization: Q/DQ nodes in the graph, what makes them cost less accuracy, and their exact folding into stored integers."""
