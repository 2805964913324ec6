"""Whether two programs are the same, and how far apart they are."""
