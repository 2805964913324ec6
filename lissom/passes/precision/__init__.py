"""Passes for mixed precision."""
