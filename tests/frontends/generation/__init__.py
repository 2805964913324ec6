"""Tests of lissom.frontends.generation."""
