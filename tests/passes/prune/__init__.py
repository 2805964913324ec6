"""Tests of lissom.passes.precision."""
