"""Lissom: a compiler-style graph optimizer for transformer inference."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lissom.integrations.registration import register_with_libraries
from lissom.shadowing import refuse_shadows
from lissom.threads import shorten_waiting
from lissom.version import __version__

# Before torch is imported, which a file of the current directory may hide, and which loads OpenMP.
refuse_shadows()
shorten_waiting()

if TYPE_CHECKING:
    from lissom.api import Optimized, compile, optimize
    from lissom.backends.distributed.backend import Distributed
    from lissom.backends.onnxruntime.backend import OnnxRuntime
    from lissom.backends.openvino.backend import OpenVino
    from lissom.errors import LissomError
    from lissom.frontends.onnx.model import from_onnx
    from lissom.generation.compile import compile_generation, load_generation
    from lissom.generation.compile_pool import compile_pool, load_pool
    from lissom.inspect.svg.step import draw
    from lissom.integrations.transformers.pruned_tokenizer import pruned_tokenizer
    from lissom.passes.sites import sites
    from lissom.runtime.compiled_model import CompiledModel, load
    from lissom.torch_compile import dynamo_reports
    from lissom.tuning.generation import tune_generation
    from lissom.tuning.tuned import Tuned, tune

__all__ = [
    "CompiledModel",
    "Distributed",
    "LissomError",
    "OnnxRuntime",
    "OpenVino",
    "Optimized",
    "Tuned",
    "__version__",
    "compile",
    "compile_generation",
    "compile_pool",
    "draw",
    "dynamo_reports",
    "from_onnx",
    "load",
    "load_generation",
    "load_pool",
    "optimize",
    "pruned_tokenizer",
    "sites",
    "tune",
    "tune_generation",
]

_HOMES = {
    "CompiledModel": "lissom.runtime.compiled_model",
    "Distributed": "lissom.backends.distributed.backend",
    "LissomError": "lissom.errors",
    "OnnxRuntime": "lissom.backends.onnxruntime.backend",
    "OpenVino": "lissom.backends.openvino.backend",
    "Optimized": "lissom.api",
    "Tuned": "lissom.tuning.tuned",
    "pruned_tokenizer": "lissom.integrations.transformers.pruned_tokenizer",
    "compile": "lissom.api",
    "compile_generation": "lissom.generation.compile",
    "compile_pool": "lissom.generation.compile_pool",
    "draw": "lissom.inspect.svg.step",
    "dynamo_reports": "lissom.torch_compile",
    "from_onnx": "lissom.frontends.onnx.model",
    "load": "lissom.runtime.compiled_model",
    "load_generation": "lissom.generation.compile",
    "load_pool": "lissom.generation.compile_pool",
    "optimize": "lissom.api",
    "sites": "lissom.passes.sites",
    "tune": "lissom.tuning.tuned",
    "tune_generation": "lissom.tuning.generation",
}
"""The module that defines each public name, imported on first access because torch and sympy take seconds."""
_ROOMS = (
    "artifacts",
    "backends",
    "compiler",
    "errors",
    "export",
    "frontends",
    "generation",
    "inspect",
    "measure",
    "ops",
    "passes",
    "runtime",
)
"""Packages that `import lissom` makes reachable by their names."""


def __getattr__(name: str) -> object:
    if name in _HOMES:
        attribute = getattr(import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        # The room alone: `from lissom import ops` in one of them comes here too, before the others are imported.
        attribute = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    globals()[name] = attribute
    return attribute


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


register_with_libraries()
