"""Tests of lissom.api."""
