"""Tests of lissom.passes.canonical."""
