"""Pruning of heads and neurons: importance criteria, budgets, and reconstruction of the remaining weights."""
