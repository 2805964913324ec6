"""Hashes that tell programs, weights and data apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from lissom.compiler.ir.program import Program


def fingerprint(*parts: object) -> str:
    """A hash of texts, and of samples with their values."""
    found = hashlib.sha256()
    for part in parts:
        _feed(found, part)
    return found.hexdigest()[:32]


def program_fingerprint(program: Program) -> str:
    """A hash of a program's text and weights."""
    return fingerprint(program.text(), [item for pair in program.weights().items() for item in pair])


def _feed(found: hashlib._Hash, part: object) -> None:
    if isinstance(part, torch.Tensor):
        tensor = part.detach().cpu().contiguous()
        _feed(found, f"{tensor.dtype} {list(tensor.shape)}")
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(part, Mapping):
        _feed(found, [item for pair in sorted(part.items()) for item in pair])
    elif isinstance(part, Sequence) and not isinstance(part, str):
        _feed(found, f"[{len(part)}")
        for item in part:
            _feed(found, item)
    else:
        encoded = str(part).encode()
        found.update(f"{len(encoded)}:".encode() + encoded)
