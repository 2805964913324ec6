"""The pass `prune-layers` and the branches it takes out."""
