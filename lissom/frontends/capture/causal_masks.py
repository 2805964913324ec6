"""Masks of `torch.nn.Transformer` as they are given: an export does not read from their values whether one is causal.

`torch.nn.TransformerEncoder` and `TransformerDecoder` compare a mask with the causal one and, if they are equal, leave the mask
out of attention for `is_causal=True`. A graph has one path for all values; the mask as a mask is right for every one.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch.nn.modules import transformer

from lissom.frontends.capture.isolation import exchanged

_DETECTION = "_detect_is_causal_mask"


@contextmanager
def masks_as_given() -> Generator[None]:
    """Exchange the detection in this thread's exports, until the block ends; a caller's own `is_causal=` stays."""
    own, thread = getattr(transformer, _DETECTION, None), threading.get_ident()
    if own is None:
        yield
        return

    def detect(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
        if threading.get_ident() == thread and torch.compiler.is_exporting():
            return is_causal is True
        return own(mask, is_causal, size)

    with exchanged(transformer, _DETECTION, detect):
        yield
