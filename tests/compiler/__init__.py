"""Tests of lissom.compiler."""
