"""Tests of lissom.passes.prune."""
