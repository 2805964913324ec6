"""Lissom: a compiler-style graph optimizer for transformer inference."""

from lissom.api import CompiledModel, Optimized, compile, load, optimize
from lissom.backends.onnxruntime import OnnxRuntime
from lissom.frontends.onnx import from_onnx
from lissom.torch_compile import dynamo_reports
from lissom.version import __version__

__all__ = [
    "CompiledModel",
    "OnnxRuntime",
    "Optimized",
    "__version__",
    "compile",
    "dynamo_reports",
    "from_onnx",
    "load",
    "optimize",
]
