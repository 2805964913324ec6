"""Tests of lissom.generation."""
