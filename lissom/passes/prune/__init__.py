"""Pruning: approximations choose what goes and zero it, rewrites take it out."""
