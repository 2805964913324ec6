"""Capture of a module and example inputs as a program, by `torch.export`: tracing, dynamic sizes, conversion, checks."""
