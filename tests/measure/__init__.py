"""Tests of lissom.measure."""
