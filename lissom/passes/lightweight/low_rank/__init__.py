"""The pass `low-rank` and its factors."""
