"""Which positions an attention sees, read from the calls that make its mask."""
