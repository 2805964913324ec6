"""Inputs for checks: the caller's example, and variants of it at other sizes, drawn so that they stay valid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from lissom.compiler.errors import InputError
from lissom.compiler.signature import Signature, evaluate

Sample = list[torch.Tensor]


def resize(signature: Signature, example: Sequence[torch.Tensor], sizes: Mapping[sympy.Symbol, int], seed: int = 0) -> Sample:
    """The example with its dynamic dimensions at `sizes`.

    Rows and positions are drawn from the example's own, the same ones for every argument that shares the
    dimension, so token ids stay inside the vocabulary and masks stay masks.
    """
    generator = torch.Generator().manual_seed(seed)
    picks: dict[tuple[object, int], torch.Tensor] = {}
    resized = []
    for leaf, tensor in zip(signature.tensors, example, strict=True):
        for dim, size in enumerate(leaf.type.shape):
            if isinstance(size, int):
                continue
            new, old = evaluate(size, sizes), tensor.shape[dim]
            key = (size, old)
            if key not in picks:
                picks[key] = torch.randint(0, old, (new,), generator=generator)
            tensor = tensor.index_select(dim, picks[key].to(tensor.device))
        resized.append(tensor)
    return resized


def mask_tail(example: Sequence[torch.Tensor]) -> Sample:
    """The example with the end of its last row masked out, wherever an input is all ones.

    An all-ones input is a mask in practice, and a rewrite that drops a mask passes every check made on it.
    """
    return [_zero_tail(tensor) if _all_ones(tensor) else tensor for tensor in example]


def check_samples(signature: Signature, example: Sequence[torch.Tensor]) -> list[Sample]:
    """What every exact pass is checked on: the example, and a variant with other sizes and a masked tail."""
    return [list(example), mask_tail(_other_sizes(signature, example))]


def _other_sizes(signature: Signature, example: Sequence[torch.Tensor]) -> Sample:
    sizes = signature.sizes_of(example)
    grown = {symbol: size + 1 + index for index, (symbol, size) in enumerate(sizes.items())}
    doubled = {symbol: size * 2 for symbol, size in sizes.items()}
    shrunk = {symbol: max(signature.dimensions[symbol].minimum, size // 2) for symbol, size in sizes.items()}
    for other in (grown, doubled, shrunk):
        variant = resize(signature, example, other)
        try:
            signature.check_sizes(variant)
        except InputError:
            continue
        return variant
    return list(example)


def _all_ones(tensor: torch.Tensor) -> bool:
    return tensor.dim() >= 2 and tensor.shape[-1] > 1 and bool((tensor == 1).all())


def _zero_tail(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[-1, ..., tensor.shape[-1] // 2 + 1 :] = 0
    return changed
