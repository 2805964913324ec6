"""Passes that share a program among ranks."""
