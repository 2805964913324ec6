"""Programs from ONNX files: reads the file, and converts its graph to PyTorch operators."""
