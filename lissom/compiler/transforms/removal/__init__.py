"""Removal of indices from every tensor that has them."""
