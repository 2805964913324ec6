"""Analyses of a program, which do not change it."""
