"""Tests of lissom.cli."""
