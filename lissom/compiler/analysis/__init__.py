"""Analyses of a program, which read it and change nothing."""
