"""Folders for ONNX Runtime GenAI: the decoder with its KV cache, the configuration, and the check in a fresh process."""
