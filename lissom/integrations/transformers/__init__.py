"""Lissom inside transformers: Auto classes for saved models, the backend of its exporters, and `generate` on exports."""
