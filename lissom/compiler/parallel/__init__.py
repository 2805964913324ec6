"""Tensor parallelism: which weights ranks share, and what each node's value is on a rank."""
