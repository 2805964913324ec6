"""Passes for tensor parallelism: the plan of placements, and the partition of a program by it."""
