"""The table of backends, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lissom.backends.base import Backend
from lissom.backends.distributed.backend import Distributed
from lissom.backends.eager.backend import Eager
from lissom.backends.inductor import Inductor
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.errors import UnsupportedError, nearest

BACKENDS: Mapping[str, type[Backend]] = {backend.name: backend for backend in (Eager, Inductor, OnnxRuntime, Distributed)}

FASTEST = "fastest"
"""The name for the fastest of all backends."""


def find_backend(wanted: str | Backend) -> Backend:
    """The backend of that name, with default options; or the object given.

    Raises: UnsupportedError when there is none, or this machine lacks its requirements.
    """
    names = (*BACKENDS, FASTEST)
    if isinstance(wanted, Backend):
        backend = wanted
    elif not isinstance(wanted, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UnsupportedError(
            f"backend= is {wanted!r:.80}; give a name, {', '.join(names)}, or an object with options, such as "
            f"lissom.OnnxRuntime(threads=2)"
        )
    elif wanted in BACKENDS:
        backend = BACKENDS[wanted]()
    else:
        hint = nearest(wanted, names) or ";"
        raise UnsupportedError(f"there is no backend '{wanted}'{hint} choose {', '.join(names)}")
    missing = backend.missing()
    if missing is not None:
        raise UnsupportedError(missing)
    return backend


def find_backends(wanted: str | Backend) -> Sequence[Backend]:
    """The backend of that name, or the object given; for `fastest` all that run in one process, available here or not.

    Raises: UnsupportedError when there is none, or this machine lacks its requirements.
    """
    if not isinstance(wanted, str) or wanted != FASTEST:
        return [find_backend(wanted)]
    return [backend() for backend in BACKENDS.values() if not backend.runs_ranks]
