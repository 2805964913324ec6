"""Attention heads: grouped keys and values, and the layers that produce them."""
