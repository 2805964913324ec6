"""Tests of lissom.frontends.models."""
