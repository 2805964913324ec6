"""Tests of lissom.export."""
