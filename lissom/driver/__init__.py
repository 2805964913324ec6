"""The driver of a compile: resolves the options, runs the passes, and measures whether lossy passes pay off."""
