"""Passes that put sparse or linear attention in place of dense (survey §2.1, §2.2)."""
