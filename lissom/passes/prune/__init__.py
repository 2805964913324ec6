"""Pruning: approximations that choose and zero structure, and exact rewrites that remove what is zero."""
