"""A program as an ONNX model: the export, and the variants that ONNX Runtime is fast with."""
