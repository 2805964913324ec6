"""Passes that train weights, to recover what approximations lost."""
