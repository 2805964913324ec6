"""Checkpoints in the format of compressed-tensors: schemes, the writer, and the check in a fresh process."""
