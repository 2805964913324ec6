"""Passes for mixed precision: casts, and where they stand."""
