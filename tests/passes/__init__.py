"""Tests of lissom.passes."""
