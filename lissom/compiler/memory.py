"""Memory of the process: malloc_trim, huge pages for weights, and gc.freeze."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch


def give_back_memory() -> None:
    """Give pages that hold nothing back to the system, where the C library can; else do nothing.

    Calibration makes many tensors of a few megabytes, which glibc keeps when they are gone: on MiniLM as much as all weights.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def use_huge_pages(tensors: Iterable[torch.Tensor], own: Iterable[torch.Tensor] = ()) -> None:
    """Ask Linux to put the memory of tensors on a CPU into huge pages, where it lies and now; else do nothing.

    A processor stops prefetching at the end of a page, and finding the next one takes longest under a hypervisor, which has
    page tables of its own: one core reads pages of 2 MiB up to twice as fast as those of 4 KiB. A huge page is made where at
    least half of it is memory of these tensors.

    Args:
        own: those whose memory is nobody else's. Small ones are moved together: among others' memory in a heap they would lose
            their huge pages whenever the C library gives back what is free between them.
    """
    size = _huge_page_bytes()
    if not size:
        return
    _move_together(own, size)
    used: dict[int, int] = {}
    for address, count in set(map(_extent, filter(is_plain, tensors))):
        for page in range(address // size, -(-(address + count) // size)):
            inside = min(address + count, (page + 1) * size) - max(address, page * size)
            used[page] = used.get(page, 0) + inside
    advise = ctypes.CDLL(None, use_errno=True).madvise
    refused = 0
    for page in sorted(page for page, inside in used.items() if 2 * inside >= size):
        place = ctypes.c_void_p(page * size), ctypes.c_size_t(size)
        if not advise(*place, _COLLAPSE):
            refused = 0
            continue
        # Linux before 6.1 cannot do it now; it then does it by and by.
        if ctypes.get_errno() == errno.EINVAL:
            advise(*place, _HUGE)
        elif (refused := refused + 1) == _MOST_REFUSALS:
            break  # there are no free huge pages, and looking for one takes milliseconds


def huge_block(size: int, page: int = 1 << 21) -> tuple[mmap.mmap, int]:
    """Memory of its own for so many bytes, in huge pages where the system has them, and the place of the first page's start.

    Raises:
        OSError: if there is no memory.
    """
    block = mmap.mmap(-1, (size // page + 2) * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without huge pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return block, -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % page


def _move_together(tensors: Iterable[torch.Tensor], page: int) -> None:
    """Move the memory of small tensors into huge pages. A mapped file, which processes share, stays where it is."""
    held: dict[int, list[torch.Tensor]] = {}
    for tensor in filter(is_plain, tensors):
        storage = tensor.untyped_storage()
        if storage.resizable() and 0 < storage.nbytes() < _MOST_MOVED_PAGES * page:
            held.setdefault(storage.data_ptr(), []).append(tensor)
    places = [0, *accumulate(-(-_extent(first)[1] // _LINE) * _LINE for first, *_ in held.values())]
    if places[-1] < page // 2:
        return
    try:
        block, start = huge_block(places[-1], page)
    except OSError:
        return  # there is no memory for both
    for place, sharing in zip(places[:-1], held.values(), strict=True):
        storage = sharing[0].untyped_storage()
        moved = torch.frombuffer(block, dtype=torch.uint8, count=storage.nbytes(), offset=start + place)
        moved.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        for tensor in sharing:
            with torch.inference_mode(tensor.is_inference()):
                view = torch.empty(0, dtype=tensor.dtype)
                tensor.data = view.set_(moved.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


_MOST_MOVED_PAGES, _LINE = 4, 64
"""The pages of what is moved, and the bytes of a line of the cache."""
_HUGE, _COLLAPSE = 14, 25
"""Numbers of Linux's advice on memory."""
_MOST_REFUSALS = 16
"""In a row."""


def is_plain(tensor: torch.Tensor) -> bool:
    """True for a dense tensor on a CPU, of no class of its own."""
    dense = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_quantized
    return dense and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The address and the bytes of a tensor's memory."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@cache
def _huge_page_bytes() -> int:
    """The size of a huge page; 0 where the system has none or must not use them."""
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    try:
        allowed = "[never]" not in (folder / "enabled").read_text()
        return int((folder / "hpage_pmd_size").read_text()) if allowed else 0
    except (OSError, ValueError):
        return 0


_MUCH = 1 << 26
"""The bytes of weights for which a full collection, some tenths of a second, pays."""


def free_dropped_programs(size: int) -> None:
    """Free programs that nothing refers to any more, where they have many bytes of weights.

    Graphs are cycles, and Python's collector, which goes by the number of objects, would keep several programs.
    """
    if size >= _MUCH:
        gc.collect()


_aside: list[bool] = []
"""Not empty while the heap is set aside. Passes run under the lock of `frontends/capture/isolation.py`, one thread at once."""


@contextmanager
def heap_set_aside() -> Generator[None]:
    """Keep the garbage collector from going through what lives already, the model and torch itself, while passes run.

    Passes make many small objects, and each full collection over a whole process costs as much as several passes.
    """
    # Counting takes as long as there are frozen objects: only what freezes first asks, where a caller's own are usually none.
    if _aside or not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    gc.freeze()
    _aside.append(True)
    try:
        yield
    finally:
        _aside.clear()
        gc.unfreeze()
