"""Passes that put cheaper layers in place of a transformer's own (survey §2.2)."""
