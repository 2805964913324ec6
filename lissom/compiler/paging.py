"""The weights of a large model on disk while it is compiled: those of its files are mapped, those that passes make are too.

A model that was read from its files for one compile alone is compiled inside `paged`. Mapped weights stay in memory until
there is too much of them; the system reads them again from the files, or from its cache of them. Large weights that passes make
move to temporary files, which have no name, so that nothing is left behind. `take_home` moves those of the result back.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import re
import sys
import tempfile
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lissom.compiler.memory import give_back_memory, is_plain, unwritten_zeros
from lissom.errors import UnsupportedError

LARGE = 1 << 29
"""The bytes of weights from which a model is compiled from the disk."""
SPILLED = 1 << 20
"""The bytes from which a weight moves to a file."""
_LEAST_HELD, _PART_HELD = 1 << 27, 32
"""The bytes of mapped weights that stay in memory: this part of the model's, and at least so many."""
_PART = 1 << 24
"""The bytes of a weight that are moved at once."""
_SECONDS = 0.01
_GONE = 4
"""Linux's advice that pages may go."""


class _Pager(threading.Thread):
    """Mapped weights, and a thread that lets go of their pages when too many are in memory.

    A tensor is known by its address while it lives there: pages of other memory would be lost.
    """

    def __init__(self, weights: Iterable[torch.Tensor], size: int) -> None:
        super().__init__(name="lissom-pager", daemon=True)
        self._lock, self._ended = threading.Lock(), threading.Event()
        clean = [*_clean_mappings()]
        mapped = [weight for weight in weights if any(_is_inside(weight, *mapping) for mapping in clean)]
        self._mapped = {weight.data_ptr(): weakref.ref(weight) for weight in mapped}
        self._spilled: dict[int, weakref.ref[torch.Tensor]] = {}
        self._let_go()
        self._held = _mapped_bytes() + max(_LEAST_HELD, size // _PART_HELD)

    def run(self) -> None:
        while not self._ended.wait(_SECONDS):
            if _mapped_bytes() > self._held:
                self._let_go()

    def end(self) -> None:
        self._ended.set()
        self.join()

    def spill(self, tensor: torch.Tensor) -> None:
        """Move a tensor to a file. Raises UnsupportedError if there is no room for it."""
        whole = tensor.nbytes == tensor.untyped_storage().nbytes()
        if tensor.nbytes < SPILLED or not whole or not is_plain(tensor) or not tensor.untyped_storage().resizable():
            return
        place = empty_on_disk(tensor.nbytes)
        self._move(tensor, place, place)
        self._spilled[tensor.data_ptr()] = weakref.ref(tensor)

    def take_home(self, tensors: Iterable[torch.Tensor]) -> None:
        """Move spilled tensors back into memory."""
        give_back_memory()
        for tensor in tensors:
            known = self._spilled.pop(tensor.data_ptr(), None)
            if known is not None and known() is tensor:
                held = _bytes_in(tensor)
                self._move(tensor, unwritten_zeros([tensor.nbytes])[0], held)

    def _move(self, tensor: torch.Tensor, place: torch.Tensor, on_disk: torch.Tensor) -> None:
        """Move a tensor to the place, of which or of whose old place no more than a part is in memory, that on the disk."""
        parts = (each.split(_PART) for each in (_bytes_in(tensor), place, on_disk))
        for old, new, mapped in zip(*parts, strict=True):
            new.copy_(old)
            let_go(mapped.data_ptr(), mapped.nbytes)
        moved = place.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())
        with self._lock, torch.inference_mode(tensor.is_inference()):
            tensor.data = moved.view_as(moved)

    def _let_go(self) -> None:
        with self._lock:
            for known in (self._mapped, self._spilled):
                for address, reference in [*known.items()]:
                    tensor = reference()
                    if tensor is None:
                        known.pop(address, None)
                    elif tensor.data_ptr() == address:
                        let_go(address, tensor.nbytes)


_pagers: list[_Pager] = []
"""That of the compile that runs, if its model is large. One compiles at once, under the lock of `capture/isolation.py`."""


@contextmanager
def paged(weights: Iterable[torch.Tensor], stored: Iterable[torch.Tensor] = ()) -> Generator[None]:
    """Compile a model from the disk, if it is large.

    Args:
        weights: of a model that nobody else reads or writes.
        stored: what else is mapped of its files.
    """
    weights = [*weights]
    if not is_large(weights) or _pagers:
        yield
        return
    give_back_memory()  # of the loader
    pager = _Pager([*weights, *stored], _bytes_of(weights))
    del weights, stored
    _pagers.append(pager)
    pager.start()
    try:
        yield
    finally:
        _pagers.clear()
        pager.end()


def is_large(weights: Iterable[torch.Tensor]) -> bool:
    """True if a model with these weights is compiled from the disk, on this system."""
    return sys.platform == "linux" and _bytes_of(weights) >= LARGE


def _bytes_in(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor, uint8."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _bytes_of(weights: Iterable[torch.Tensor]) -> int:
    """The bytes of tensors, those that share memory counted once."""
    return sum({weight.data_ptr(): weight.nbytes for weight in weights}.values())


def is_paged() -> bool:
    """True while a model is compiled from the disk."""
    return bool(_pagers)


def spill(tensor: torch.Tensor) -> None:
    """Move a large tensor that a pass made to the disk, while a large model is compiled.

    Raises:
        UnsupportedError: if the disk is full.
    """
    for pager in _pagers:
        pager.spill(tensor)


def take_home(tensors: Iterable[torch.Tensor]) -> None:
    """Take tensors back into memory that were moved to the disk."""
    for pager in _pagers:
        pager.take_home(tensors)


def empty_on_disk(size: int) -> torch.Tensor:
    """So many bytes, uint8, in a file without a name, which goes when the tensor does.

    Raises:
        UnsupportedError: if there is no room.
    """
    folder = folder_of_files()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=torch.uint8)
    except OSError as error:
        raise UnsupportedError(
            f"{folder} has no room for {size / 1e6:.3g} MB of weights while the model is compiled ({error.strerror}); "
            f"set TMPDIR to a folder with more room"
        ) from error


def empty_values(shape: Sequence[int]) -> torch.Tensor:
    """A tensor of float32 on the CPU, on the disk if it is large. Raises UnsupportedError if that is full."""
    size = 4 * math.prod(shape)
    if size < SPILLED:
        return torch.empty(*shape, dtype=torch.float32, device="cpu")
    return empty_on_disk(size).view(torch.float32).view(*shape)


def release(values: torch.Tensor) -> None:
    """Let the memory of a tensor of `empty_values`, or of a part, go if it is on the disk; it is read again when needed."""
    if values.untyped_storage().nbytes() >= SPILLED:
        let_go(values.data_ptr(), values.nbytes)


def let_go(address: int, size: int) -> None:
    """Let the pages of a mapped file go, to which the process has written nothing, or which other processes may write too."""
    first, last = -(-address // mmap.PAGESIZE), (address + size) // mmap.PAGESIZE
    if last > first:
        place = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((last - first) * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(*place, _GONE)


def folder_of_files() -> str:
    """The folder of the files without names: TMPDIR, else /var/tmp, as /tmp is often in memory."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir())


def _mapped_bytes() -> int:
    """The bytes of mapped files in the process's memory."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[2]) * mmap.PAGESIZE


def _clean_mappings() -> Iterator[tuple[int, int]]:
    """The first and last address of each mapped file of which the process has written nothing."""
    entries = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for entry in entries:
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+) +/", entry)
        if header is not None and header[3] != "0" and re.search(r"^Anonymous: +0 kB", entry, re.MULTILINE):
            yield int(header[1], 16), int(header[2], 16)


def _is_inside(tensor: torch.Tensor, first: int, last: int) -> bool:
    return first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= last
