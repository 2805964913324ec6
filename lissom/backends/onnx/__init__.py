"""A program as an ONNX model: the export, and the forms ONNX Runtime is fast in."""
