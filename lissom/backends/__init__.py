"""The ways out of a program, in one table."""

from __future__ import annotations

from collections.abc import Mapping

from lissom.backends.base import Backend
from lissom.backends.eager import Eager
from lissom.compiler.errors import UnsupportedError, nearest

BACKENDS: Mapping[str, type[Backend]] = {backend.name: backend for backend in (Eager,)}


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises: UnsupportedError when there is none.
    """
    if name not in BACKENDS:
        hint = nearest(name, BACKENDS) or ";"
        raise UnsupportedError(f"there is no backend '{name}'{hint} choose {', '.join(BACKENDS)}")
    return BACKENDS[name]()
