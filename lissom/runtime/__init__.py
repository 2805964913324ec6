"""Compiled models: their calls, their reports, and how they take the place of the original model."""
