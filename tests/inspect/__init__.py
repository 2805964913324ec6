"""Tests of lissom.inspect."""
