"""The time of a rewritten layer beside that of the original, for passes that rewrite what gets faster."""

from __future__ import annotations

from collections.abc import Callable

import torch

GAIN = 0.97
"""A rewritten layer must take less than this fraction of the original's time, so that noise does not decide."""
_SECONDS = 0.05


def median_seconds(call: Callable[[], object], threads: int = 1) -> float:
    """The median time of a call, without gradients, on that many threads."""
    # It imports what compiles C++, which takes a fifth of a second.
    from torch.utils.benchmark import Timer

    with torch.inference_mode():
        return Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange(min_run_time=_SECONDS).median
