"""Tests of lissom.passes.lightweight."""
