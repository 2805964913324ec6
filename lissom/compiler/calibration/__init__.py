"""Statistics of activations on the caller's calibration data."""
