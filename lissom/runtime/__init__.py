"""Compiled models, and how they take the place of the original model."""
