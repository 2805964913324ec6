"""Exact passes that bring equivalent code into one canonical form."""
