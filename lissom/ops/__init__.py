"""Operators of our own: what PyTorch has no single operator for. Importing this package registers them."""

from lissom.ops.attention import attention

__all__ = ["attention"]
