"""Tests of lissom.passes.attention."""
