"""The pass `sparsify-attention`, how it measures attention, and how it writes masks."""
