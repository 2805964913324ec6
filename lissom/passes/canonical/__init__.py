"""Exact passes that bring any author's spelling into one form."""
