"""What a caller holds of a compiled model, and how it stands in for the model it came from."""
