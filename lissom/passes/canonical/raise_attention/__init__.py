"""The pass `raise-attention` and its analysis of scores."""
