"""Ours or PyTorch's: linear layers of a shape are timed with both, once a machine, and the times are kept in a file."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn import functional

from lissom.errors import InputError
from lissom.measure.timing import time_calls
from lissom.ops.native.build import cache_folder, kept_library, processor_kind
from lissom.ops.packed_linear import pack, packed_linear

SWITCH = "LISSOM_KERNELS"
"""The environment variable: `measured`, which is the default, or `ours`, which times nothing."""
_FEWEST_PRODUCTS, _MOST_WEIGHTS = 1 << 22, 1 << 24
"""Calls of fewer multiplications take a few microseconds either way; larger weights would be held twice for the measurement."""
_CLEARLY = 1.2
"""PyTorch's product is taken where ours takes so many times as long, in two measurements: fused epilogues save some of that."""
_MOST_ROWS = 1024
"""More rows take as long each."""
_ROUNDS, _SECONDS = 2, 0.02

_FASTER = "PyTorch's product takes"
Times = tuple[float, float]
"""Milliseconds of our product and of PyTorch's."""


def slower_than_pytorch(dtype: torch.dtype, rows: int, inputs: int, features: int) -> str | None:
    """The reason PyTorch's product is taken for a linear layer of this shape, in words for the history; None if ours is.

    Raises:
        InputError: if the environment variable is neither `measured` nor `ours`.
    """
    given = os.environ.get(SWITCH, "measured")
    if given not in ("measured", "ours"):
        raise InputError(f"{SWITCH} is {given!r:.80}; give measured or ours")
    if given == "ours" or rows * inputs * features < _FEWEST_PRODUCTS or inputs * features > _MOST_WEIGHTS:
        return None
    ours, theirs = _times(dtype, rows, inputs, features, torch.get_num_threads())
    if ours < _CLEARLY * theirs:
        return None
    return f"{_FASTER} {theirs:.3g} ms for {rows} rows here, and Lissom's kernel {ours:.3g} ms"


def is_measured(reason: str) -> bool:
    """True for a sentence of `slower_than_pytorch`: both products were timed, and PyTorch's was faster."""
    return reason.startswith(_FASTER)


@cache
def _times(dtype: torch.dtype, rows: int, inputs: int, features: int, threads: int) -> Times:
    key = f"{dtype} {min(rows, _MOST_ROWS)}x{inputs}x{features}".removeprefix("torch.")
    file = _file(threads)
    known = _read(file) if file is not None else {}
    if key not in known:
        known[key] = _measure(dtype, rows, inputs, features)
        if file is not None:
            _write(file, {**_read(file), **known})
    return known[key]


def _measure(dtype: torch.dtype, rows: int, inputs: int, features: int) -> Times:
    x = torch.ones(min(rows, _MOST_ROWS), inputs, dtype=dtype, device="cpu")
    weight = torch.ones(features, inputs, dtype=dtype, device="cpu")
    packed = pack(weight)
    calls = {"ours": partial(packed_linear, x, packed, features=features), "theirs": partial(functional.linear, x, weight)}
    rounds: list[Times] = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            ours, theirs = (time_calls({name: call}, _SECONDS)[name].median_ms for name, call in calls.items())
            rounds.append((ours, theirs))
    return min(rounds, key=lambda times: times[0] / times[1])


def _file(threads: int) -> Path | None:
    """The file of this machine's times; None where the user's cache cannot be used."""
    try:
        library = kept_library()  # its name holds a hash of the kernels' sources
        instructions = f"{processor_kind()}-{torch.ops.lissom.use_amx():d}{torch.ops.lissom.dots_bfloat16():d}"
        return cache_folder() / f"products-{library.stem}-{instructions}-{threads}-threads-torch-{torch.__version__}.json"
    except (OSError, RuntimeError):
        return None


def _read(file: Path) -> dict[str, Times]:
    """The times in a file; none where it is missing or is no such file."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {str(key): (float(ours), float(theirs)) for key, (ours, theirs) in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}


def _write(file: Path, times: dict[str, Times]) -> None:
    part = file.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # a full disk: the shape is measured again next time
        part.write_text(json.dumps(times, indent=1), encoding="utf-8")
        part.replace(file)
