"""Measurements: the timer, the ceilings of this machine, and choices by measured time. Tables of them are in `inspect`."""
