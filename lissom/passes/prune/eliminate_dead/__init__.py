"""The pass `eliminate-dead`, with one module per kind of unit."""
