"""Tests of lissom.export.genai."""
