"""Statistics of what nodes yield on a caller's data."""
