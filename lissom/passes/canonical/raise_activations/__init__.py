"""The pass `raise-activations` and its recognition of functions by their values."""
