"""ONNX Runtime: sessions, what they may read from a file, and which form of a model is used."""
