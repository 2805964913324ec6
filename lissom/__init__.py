"""Lissom: a compiler-style graph optimizer for transformer inference."""

# ruff: noqa: E402
from lissom.shadowing import refuse_shadows

# Before torch is imported, which a file of the current directory may hide.
refuse_shadows()

# isort: split

from lissom.api import CompiledModel, Optimized, compile, optimize
from lissom.backends.distributed.backend import Distributed
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.frontends.onnx.model import from_onnx
from lissom.generation import compile_generation, load_generation
from lissom.loading import load
from lissom.torch_compile import dynamo_reports
from lissom.version import __version__

__all__ = [
    "CompiledModel",
    "Distributed",
    "OnnxRuntime",
    "Optimized",
    "__version__",
    "compile",
    "compile_generation",
    "dynamo_reports",
    "from_onnx",
    "load",
    "load_generation",
    "optimize",
]
