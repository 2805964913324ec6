"""Axes: the tensor dimensions of a program that share their indices, and the indices that contribute nothing."""
