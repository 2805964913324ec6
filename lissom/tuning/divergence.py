"""The divergence of outputs from the exact program's, as one number that adds up over sites to first order.

    Σ ‖found − wanted‖² / Σ ‖wanted‖²     over the batches and the real tokens; of several outputs the largest

Errors of different sites are nearly uncorrelated, so their squares add. The root is the relative output error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import answers, run_samples

Run = Callable[[Sample], Sequence[object]]
_AT_ONCE = 1 << 20
"""Numbers that are compared at once: logits of a large vocabulary have a hundred million."""


class Divergence:
    """Compares programs with the exact one on some batches."""

    def __init__(self, exact: Program, batches: Sequence[Sample]) -> None:
        self.batches = batches
        self._wanted = answers(exact, run_samples(exact, batches))
        self._masks = [[self._mask(exact, sample, leaf) for leaf in exact.leaves] for sample in batches]

    @staticmethod
    def _mask(exact: Program, sample: Sample, leaf: object) -> torch.Tensor | None:
        return token_mask(exact, sample, leaf) if nodes.is_tensor(leaf) and nodes.tensor_type(leaf).rank == 3 else None

    def of_program(self, program: Program) -> float:
        """The divergence of a program that takes the same inputs; infinite if its outputs are not finite."""
        return self._compared(answers(program, run_samples(program, self.batches)))

    def of(self, run: Run) -> float:
        """The divergence of a compiled program."""
        with torch.no_grad():
            return self._compared(list(run(sample)) for sample in self.batches)

    def _compared(self, outputs: Iterable[Sequence[object]]) -> float:
        count = len(self._wanted[0])
        errors, sizes = [0.0] * count, [0.0] * count
        for left, right, masks in zip(self._wanted, outputs, self._masks, strict=True):
            for index, (wanted, value, mask) in enumerate(zip(left, right, masks, strict=True)):
                if not isinstance(wanted, torch.Tensor) or not isinstance(value, torch.Tensor):
                    continue
                if not wanted.is_floating_point():
                    continue
                a, b = (wanted, value) if mask is None else (wanted[mask], value[mask])
                for part in zip(a.flatten().split(_AT_ONCE), b.flatten().split(_AT_ONCE), strict=True):
                    error, size = _squares(*part)
                    errors[index] += error
                    sizes[index] += size
        shares = [error / size for error, size in zip(errors, sizes, strict=True) if size > 0]
        return max(shares, default=0.0) if all(map(math.isfinite, shares)) else math.inf


def _squares(wanted: torch.Tensor, actual: torch.Tensor) -> tuple[float, float]:
    """Σ (actual − wanted)² and Σ wanted² over the places where `wanted` is finite. Both: [numbers]."""
    a, b = wanted.float(), actual.float()
    difference = b - a
    error, size = float(difference @ difference), float(a @ a)
    if math.isfinite(error + size):
        return error, size
    finite = wanted.isfinite()
    a, b = wanted[finite].double(), actual[finite].double()
    return float((b - a).square_().sum()), float(a.square_().sum())
