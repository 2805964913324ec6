"""Lissom: a compiler-style graph optimizer for transformer inference."""

from lissom.api import CompiledModel, compile
from lissom.frontends.onnx import from_onnx
from lissom.version import __version__

__all__ = ["CompiledModel", "__version__", "compile", "from_onnx"]
