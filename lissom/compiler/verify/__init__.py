"""Checks that two programs are equal, and measures of their divergence."""
