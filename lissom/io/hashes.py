"""SHA-256 of ranges of an open file, hashed by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from typing import TypeVar

Result = TypeVar("Result")
_PIECE_BYTES = 1 << 20
"""The bytes read at once: more fall out of the processor's cache before they are hashed."""


def hash_ranges(handle: int, ranges: Sequence[range]) -> list[str]:
    """The SHA-256 of each range of bytes of an open file, on as many threads as there are processors.

    A file that ends in a range is hashed to its end. The file's position is not moved.

    Raises:
        OSError: if it cannot be read.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if min(len(ranges), processors) <= 1:
        return [_hash_range(handle, places) for places in ranges]
    with ThreadPoolExecutor(min(len(ranges), processors)) as pool:
        digests = [submitted(pool, lambda places=places: _hash_range(handle, places)) for places in ranges]
        return [digest.result() for digest in digests]


def submitted(pool: ThreadPoolExecutor, call: Callable[[], Result]) -> Future[Result]:
    """The result of a call in another thread; of a call now where the interpreter ends, which starts no more threads then."""
    try:
        return pool.submit(call)
    except RuntimeError:
        now: Future[Result] = Future()
        try:
            now.set_result(call())
        except Exception as error:
            now.set_exception(error)
        return now


def _hash_range(handle: int, places: range) -> str:
    digest, start = sha256(), places.start
    buffer = memoryview(bytearray(min(_PIECE_BYTES, len(places))))
    while start < places.stop and (count := os.preadv(handle, [buffer[: places.stop - start]], start)):
        digest.update(buffer[:count])
        start += count
    return digest.hexdigest()
