"""The pass `raise-activations` and how it knows functions by their values."""
