"""Memory of the process: malloc_trim, huge pages for weights, and gc.freeze."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import sys
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
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


def use_huge_pages(tensors: Iterable[torch.Tensor], own: Iterable[torch.Tensor] = (), *, behind: bool = False) -> None:
    """Ask Linux to put the memory of tensors on a CPU into huge pages, where it lies and now; else do nothing.

    A processor stops prefetching at the end of a page, and finding the next one takes longest under a hypervisor, which has
    page tables of its own: one core reads pages of 2 MiB up to twice as fast as those of 4 KiB. A huge page is made where at
    least half of it is memory of these tensors.

    Args:
        own: those whose memory is nobody else's. Small ones are moved together: among others' memory in a heap they would lose
            their huge pages whenever the C library gives back what is free between them.
        behind: make the huge pages in another thread, while the caller goes on and reads or writes the tensors: only the system
            moves their memory. They stay alive until the thread is done.
    """
    size = _huge_page_bytes()
    if not size:
        return
    _move_together(own, size)
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in filter(is_plain, tensors))}
    pages = _well_filled(storages.values(), size)
    if not behind:
        _make_huge(pages, size)
    elif pages:
        # Not a daemon: the interpreter waits for it, and it then stops after a page.
        with suppress(RuntimeError):  # the interpreter ends, and starts no more threads
            threading.Thread(target=_make_huge, args=(pages, size, storages), name="lissom-huge-pages").start()


def _well_filled(storages: Iterable[torch.UntypedStorage], size: int) -> list[int]:
    """The numbers of the huge pages of which at least half is memory of the storages, in order."""
    used: dict[int, int] = {}
    for address, count in {(storage.data_ptr(), storage.nbytes()) for storage in storages}:
        for page in range(address // size, -(-(address + count) // size)):
            inside = min(address + count, (page + 1) * size) - max(address, page * size)
            used[page] = used.get(page, 0) + inside
    return sorted(page for page, inside in used.items() if 2 * inside >= size)


def _make_huge(pages: Sequence[int], size: int, storages: object = None) -> None:
    """Ask Linux for huge pages by their numbers.

    Args:
        storages: kept until it is done.
    """
    advise = ctypes.CDLL(None, use_errno=True).madvise
    refused = 0
    for page in pages:
        if not threading.main_thread().is_alive():
            break  # the interpreter ends
        place = ctypes.c_void_p(page * size), ctypes.c_size_t(size)
        if not advise(*place, _COLLAPSE):
            refused = 0
            continue
        # Linux before 6.1 cannot do it now; it then does it by and by.
        if ctypes.get_errno() == errno.EINVAL:
            advise(*place, _HUGE)
        elif (refused := refused + 1) == _MOST_REFUSALS:
            break  # there are no free huge pages, and looking for one takes milliseconds


def _move_together(tensors: Iterable[torch.Tensor], page: int) -> None:
    """Move the memory of small tensors into huge pages. A mapped file, which processes share, stays where it is."""
    held: dict[int, list[torch.Tensor]] = {}
    for tensor in filter(is_plain, tensors):
        storage = tensor.untyped_storage()
        if storage.resizable() and 0 < storage.nbytes() < _MOST_MOVED_PAGES * page:
            held.setdefault(storage.data_ptr(), []).append(tensor)
    places = _places(first.untyped_storage().nbytes() for first, *_ in held.values())
    fresh = _fresh_pages(places[-1], page) if places[-1] >= page // 2 else None
    if fresh is None:
        return
    block, start = fresh
    for place, sharing in zip(places[:-1], held.values(), strict=True):
        storage = sharing[0].untyped_storage()
        moved = torch.frombuffer(block, dtype=torch.uint8, count=storage.nbytes(), offset=start + place)
        moved.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        for tensor in sharing:
            with torch.inference_mode(tensor.is_inference()):
                view = torch.empty(0, dtype=tensor.dtype)
                tensor.data = view.set_(moved.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _fresh_pages(size: int, page: int) -> tuple[mmap.mmap, int] | None:
    """Memory of zeros that becomes huge pages when it is written, and where a page begins in it; None if there is none left."""
    try:
        block = mmap.mmap(-1, (size // page + 2) * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return block, -torch.frombuffer(block, dtype=torch.uint8).data_ptr() % page


def _places(sizes: Iterable[int]) -> list[int]:
    """Where memory of so many bytes each begins in a block, aligned to lines of the cache; the last is the block's size."""
    return [0, *accumulate(-(-size // _LINE) * _LINE for size in sizes)]


def unwritten_zeros(sizes: Sequence[int]) -> list[torch.Tensor]:
    """Zeros of so many bytes each, torch.uint8. Large ones take no memory until they are written, and then huge pages."""
    places, page = _places(sizes), _huge_page_bytes()
    fresh = _fresh_pages(places[-1], page) if page and places[-1] >= page // 2 else None
    if fresh is None or not all(sizes):
        return [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    block, start = fresh
    return [
        torch.frombuffer(block, dtype=torch.uint8, count=size, offset=start + place)
        for size, place in zip(sizes, places[:-1], strict=True)
    ]


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of each tensor, by name. Those of zeros on a CPU take no memory until they are written."""
    zeros = [name for name, tensor in tensors.items() if _is_zero(tensor)]
    made = dict(zip(zeros, unwritten_zeros([tensors[name].nbytes for name in zeros]), strict=True))
    return {
        name: made[name].view(tensor.dtype).view(tensor.shape) if name in made else tensor.detach().clone()
        for name, tensor in tensors.items()
    }


def _is_zero(tensor: torch.Tensor) -> bool:
    """True for a contiguous tensor on a CPU with elements whose bits are all zero."""
    if not is_plain(tensor) or not tensor.is_contiguous() or tensor.is_complex() or not tensor.numel():
        return False
    octets = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    whole = octets.size - octets.size % 8
    return not (octets[:whole].view("int64").any() or octets[whole:].any())


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


@contextmanager
def collector_paused() -> Generator[None]:
    """Keep the garbage collector from running, while many objects are made that stay. Threads that overlap may end it early."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def freeze_imports() -> None:
    """Keep the garbage collector from going through what lives now until `heap_set_aside` ends. For the command line."""
    gc.freeze()
    _imports.append(True)


_imports: list[bool] = []
"""Not empty if Lissom froze what it imported."""
_aside: list[bool] = []
"""Not empty while the heap is set aside. Passes run under the lock of `frontends/capture/isolation.py`, one thread at once."""


@contextmanager
def heap_set_aside() -> Generator[None]:
    """Keep the garbage collector from going through what lives already, the model and torch itself, while passes run.

    Passes make many small objects, and each full collection over a whole process costs as much as several passes. They make
    many tensors of some megabytes as well: the C library keeps what is freed of them, as fresh pages take longer than writing.
    """
    # Counting takes as long as there are frozen objects: only what freezes first asks, where a caller's own are usually none.
    if _aside or not gc.isenabled() or (not _imports and gc.get_freeze_count()):
        yield
        return
    gc.freeze()
    _aside.append(True)
    _keep_freed(_ALL)
    try:
        yield
    finally:
        _keep_freed(2 * _FROM_HEAP)
        _aside.clear()
        gc.unfreeze()


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Numbers of parameters of glibc's malloc."""
_ALL = -1
_FROM_HEAP = 1 << 25
"""The most bytes of a block that glibc takes from a heap, as it does itself once one is freed; twice as many stay free then."""


def _keep_freed(size: int) -> None:
    """Let the C library keep so many free bytes at the end of the heap, or `_ALL`, where it is glibc; else do nothing."""
    set_parameter = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_parameter is not None:
        set_parameter(_MMAP_THRESHOLD, _FROM_HEAP)
        set_parameter(_TRIM_THRESHOLD, size)
