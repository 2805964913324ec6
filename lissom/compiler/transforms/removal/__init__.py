"""Taking indices out of every tensor they reach."""
