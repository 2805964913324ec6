"""What makes a training run the same run again: digests of its program, weights and data, and its options as text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from lissom.compiler.ir.program import Program
from lissom.compiler.training.batches import Batch


def identity_of(programs: Sequence[Program], batches: Sequence[Batch], options: str) -> dict[str, str]:
    """Texts by name. programs: the student, and the teacher if there is one. batches: with the data that is held out."""
    weights = (tensor for program in programs for tensor in program.weights().values())
    tensors = (tensor for batch in batches for tensor in (*batch.inputs, batch.labels) if tensor is not None)
    return {
        "program": hashlib.sha256("\n".join(program.text() for program in programs).encode()).hexdigest(),
        "options": options,
        "data": _digest(tensors),
        "weights before it": _digest(weights),
    }


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
