"""Test suites of PyTorch, ONNX and timm, run against Lissom: `python -m tools.suites opinfo`."""
