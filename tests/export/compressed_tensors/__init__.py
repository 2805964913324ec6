"""Tests of lissom.export.compressed_tensors."""
