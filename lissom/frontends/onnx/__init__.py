"""Programs from ONNX files: reading the file, and turning its graph into PyTorch's operators."""
