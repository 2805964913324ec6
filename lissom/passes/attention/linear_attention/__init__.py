"""The pass `linear-attention` and its feature maps."""
