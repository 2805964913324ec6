"""Passes for tensor parallelism."""
