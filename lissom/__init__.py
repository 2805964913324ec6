"""Lissom: a compiler-style graph optimizer for transformer inference."""

from lissom.api import Optimized, compile, optimize
from lissom.backends.distributed.backend import Distributed
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.frontends.onnx.model import from_onnx
from lissom.generation import compile_generation, load_generation
from lissom.runtime.compiled_model import CompiledModel, load
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
