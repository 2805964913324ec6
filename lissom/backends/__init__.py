"""Backends that run a program, and their table: PyTorch with Lissom's kernels, TorchInductor, ONNX Runtime, OpenVINO, several
ranks. Each makes an executable of a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lissom.backends.base import Backend
from lissom.backends.distributed.backend import Distributed
from lissom.backends.eager.backend import Eager
from lissom.backends.inductor import Inductor
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.openvino.backend import OpenVino
from lissom.errors import UnsupportedError, nearest

BACKENDS: Mapping[str, type[Backend]] = {
    backend.name: backend for backend in (Eager, Inductor, OnnxRuntime, OpenVino, Distributed)
}

FASTEST = "fastest"
"""The name for the fastest of all backends."""


def find_backend(wanted: str | Backend) -> Backend:
    """The backend of that name, with default options; or the object given.

    Raises:
        UnsupportedError: when there is none, it has no name of its own, or this machine lacks its requirements.
    """
    names = (*BACKENDS, FASTEST)
    if isinstance(wanted, Backend):
        check_name(wanted)
        backend = wanted
    elif not isinstance(wanted, str):
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


def is_ours(backend: Backend) -> bool:
    """True for a backend of this package, which an artifact's manifest suffices to make again."""
    return type(backend) in BACKENDS.values()


def check_name(backend: Backend) -> None:
    """Refuse a backend without a name, or with the name of another in the table. Raises UnsupportedError."""
    kind, name = type(backend).__name__, getattr(backend, "name", None)
    if not isinstance(name, str) or not name:
        raise UnsupportedError(f'the backend {kind} has no name; give its class one, `name: ClassVar[str] = "mine"`')
    if name in (*BACKENDS, FASTEST) and not is_ours(backend):
        raise UnsupportedError(f"the backend {kind} has the name '{name}', which is taken; give its class another name")


def find_backends(wanted: str | Backend) -> Sequence[Backend]:
    """The backend of that name, or the object given; for `fastest` all that run in one process, available here or not.

    Raises:
        UnsupportedError: when there is none, or this machine lacks its requirements.
    """
    if not isinstance(wanted, str) or wanted != FASTEST:
        return [find_backend(wanted)]
    return [backend() for backend in BACKENDS.values() if not backend.runs_ranks]
