"""Compiled models on disk: a directory with JSON, safetensors and the backend's own files. Nothing is ever unpickled."""

from lissom.artifacts import operators

__all__ = ["operators"]
