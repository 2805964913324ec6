"""Heads of attentions: the keys and values they share, and the layers that make them."""
