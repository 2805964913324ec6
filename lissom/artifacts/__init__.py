"""Compiled models on disk: a directory with JSON, safetensors and the backend's own files. Modules here read and write its
parts, and unpickle nothing."""

from lissom.artifacts import operators

__all__ = ["operators"]
