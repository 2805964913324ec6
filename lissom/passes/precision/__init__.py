"""Passes that compute in fewer bits."""
