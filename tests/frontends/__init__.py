"""Tests of lissom.frontends."""
