"""Tests of lissom.export.gguf."""
