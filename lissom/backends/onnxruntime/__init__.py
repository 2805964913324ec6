"""ONNX Runtime: its sessions, the options they may read from a file, and the choice among the variants of a model."""
