"""Checks that two programs are equal, and measures their divergence."""
