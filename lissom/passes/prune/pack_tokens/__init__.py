"""The pass `pack-tokens` and how it follows tokens through a program."""
