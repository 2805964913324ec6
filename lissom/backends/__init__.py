"""The ways out of a program, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lissom.backends.base import Backend
from lissom.backends.eager import Eager
from lissom.backends.inductor import Inductor
from lissom.compiler.errors import UnsupportedError, nearest

BACKENDS: Mapping[str, type[Backend]] = {backend.name: backend for backend in (Eager, Inductor)}

FASTEST = "fastest"
"""The name that stands for whichever of them is fastest."""


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises: UnsupportedError when there is none, or this machine lacks what it needs.
    """
    names = (*BACKENDS, FASTEST)
    if name not in BACKENDS:
        hint = nearest(name, names) or ";"
        raise UnsupportedError(f"there is no backend '{name}'{hint} choose {', '.join(names)}")
    backend = BACKENDS[name]()
    missing = backend.missing()
    if missing is not None:
        raise UnsupportedError(missing)
    return backend


def find_backends(name: str) -> Sequence[Backend]:
    """The backend of that name; for `fastest` all of them, those too that this machine lacks something for.

    Raises: UnsupportedError when there is none, or this machine lacks what it needs.
    """
    return [backend() for backend in BACKENDS.values()] if name == FASTEST else [find_backend(name)]
