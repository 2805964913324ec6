"""Tests of lissom.passes.lowering."""
