"""Lissom: a compiler-style graph optimizer for transformer inference."""

from lissom.api import CompiledModel, compile
from lissom.version import __version__

__all__ = ["CompiledModel", "__version__", "compile"]
