"""The pass `raise-attention` and how it reads scores."""
