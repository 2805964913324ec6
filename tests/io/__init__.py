"""Tests of lissom.io."""
