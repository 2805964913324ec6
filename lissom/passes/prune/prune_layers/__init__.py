"""The pass `prune-layers` and the residual branches that it removes."""
