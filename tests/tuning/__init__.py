"""Tests of lissom.tuning."""
