"""Frontends: capture PyTorch, Hugging Face and ONNX models as programs. No pass runs here."""
