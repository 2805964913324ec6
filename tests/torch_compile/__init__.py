"""Tests of lissom.torch_compile."""
