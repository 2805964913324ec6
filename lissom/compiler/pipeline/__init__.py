"""Passes and pipelines: how passes run in sequence, are checked and are reverted."""
