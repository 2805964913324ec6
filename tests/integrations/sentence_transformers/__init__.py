"""Tests of lissom.integrations.sentence_transformers."""
