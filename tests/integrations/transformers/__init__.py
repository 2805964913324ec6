"""Tests of lissom.integrations.transformers."""
