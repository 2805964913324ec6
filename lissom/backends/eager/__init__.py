"""The program as a Python function that calls PyTorch's and Lissom's operators."""
