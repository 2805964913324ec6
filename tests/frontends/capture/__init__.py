"""Tests of lissom.frontends.capture."""
