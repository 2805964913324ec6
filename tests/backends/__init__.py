"""Tests of lissom.backends."""
