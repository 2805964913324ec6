"""The pass `sparsify-attention`, its measurement of attention, and its mask writer."""
