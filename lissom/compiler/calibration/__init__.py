"""Statistics of activations on the caller's calibration data, for the passes that calibrate."""
