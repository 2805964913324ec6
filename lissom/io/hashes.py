"""SHA-256 of ranges of an open file, hashed by several threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256

_PIECE_BYTES = 1 << 20
"""The bytes read at once: more fall out of the processor's cache before they are hashed."""


def hash_ranges(handle: int, ranges: Sequence[range]) -> list[str]:
    """The SHA-256 of each range of bytes of an open file, on as many threads as there are processors.

    A file that ends in a range is hashed to its end. The file's position is not moved.

    Raises:
        OSError: if it cannot be read.
    """
    hash_one = partial(_hash_range, handle)
    workers = min(len(ranges), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers <= 1:
        return list(map(hash_one, ranges))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(hash_one, ranges))


def _hash_range(handle: int, places: range) -> str:
    digest, start = sha256(), places.start
    buffer = memoryview(bytearray(min(_PIECE_BYTES, len(places))))
    while start < places.stop and (count := os.preadv(handle, [buffer[: places.stop - start]], start)):
        digest.update(buffer[:count])
        start += count
    return digest.hexdigest()
