"""Sharding propagation rules, one per operator."""
