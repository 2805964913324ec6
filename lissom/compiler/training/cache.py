"""The teacher's values for every batch, computed once and kept in half precision in a temporary file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lissom.compiler.training.teacher import Targets

_SHARE_OF_DISK = 0.25
_LARGEST = torch.finfo(torch.float16).max / 2


@dataclass(frozen=True)
class _Kept:
    """A tensor in the file: where it starts, its dtype there, and its own dtype, shape and device."""

    start: int
    stored: torch.dtype
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


class TargetCache:
    """Targets by the index of their batch. A file that grows too large, or a full disk, ends the caching and nothing else.

    Half precision adds a relative error of 5e-4 to what the student is compared with, far below its own.

    Args:
        room: the most bytes of the file; by default a quarter of the free disk space.
    """

    def __init__(self, room: int | None = None) -> None:
        self._file = tempfile.TemporaryFile(prefix="lissom-")  # noqa: SIM115 - open until `close`
        self._room = int(_SHARE_OF_DISK * shutil.disk_usage(tempfile.gettempdir()).free) if room is None else room
        self._end, self._left_out = 0, set[int]()
        self._known: dict[int, tuple[dict[int | str, _Kept], Mapping[int | str, torch.Tensor | None]]] = {}

    def targets(self, index: int, make: Callable[[], Targets]) -> Targets:
        """The targets of a batch, made the first time."""
        if index in self._known:
            places, real = self._known[index]
            outputs = {key: self._read(place) for key, place in places.items() if isinstance(key, int)}
            hidden = {key: self._read(place) for key, place in places.items() if isinstance(key, str)}
            return Targets(outputs, hidden, real)
        targets = make()
        if not self._left_out:
            self._keep(index, targets)
        else:
            self._left_out.add(index)
        # Read back, so that a run that goes on has the values of one that was never interrupted.
        return self.targets(index, make) if index in self._known else targets

    def shortage(self) -> str | None:
        """A sentence on the batches whose targets found no room; None when there are none."""
        if not self._left_out:
            return None
        return (
            f"the disk of {tempfile.gettempdir()} had no room for the teacher's values of {len(self._left_out)} of "
            f"{len(self._known) + len(self._left_out)} batches, which were computed anew each time; set TMPDIR to a larger disk"
        )

    def close(self) -> None:
        """Delete the file."""
        self._file.close()

    def _keep(self, index: int, targets: Targets) -> None:
        start, places = self._end, dict[int | str, _Kept]()
        try:
            for key, tensor in (*targets.outputs.items(), *targets.hidden.items()):
                places[key] = self._write(tensor)
        except OSError:
            self._end = start
            self._left_out.add(index)
            return
        self._known[index] = places, targets.real

    def _write(self, tensor: torch.Tensor) -> _Kept:
        stored = torch.float16 if not tensor.numel() or bool(tensor.abs().max() < _LARGEST) else torch.bfloat16
        data = tensor.detach().to("cpu", stored).contiguous().view(torch.int16).numpy().tobytes()
        if self._end + len(data) > self._room:
            raise OSError("it would take more than its share of the free disk space")
        place = _Kept(self._end, stored, tensor.dtype, tensor.shape, tensor.device)
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], self._end + written)
        self._end += len(data)
        return place

    def _read(self, place: _Kept) -> torch.Tensor:
        data = bytearray(os.pread(self._file.fileno(), 2 * place.shape.numel(), place.start))
        return torch.frombuffer(data, dtype=place.stored).view(place.shape).to(place.device, place.dtype)
