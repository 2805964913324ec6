"""The best low-rank approximation of a linear layer, and the allotment of a byte budget to layers as ranks.

W: [features out, features in]; X: [tokens, features in], the layer's input; H = XᵀX. The matrix W' of rank r with the least

    ‖XWᵀ - XW'ᵀ‖² = tr((W - W') H (W - W')ᵀ)

projects the layer's output onto its r principal directions: W' = U_r U_rᵀ W, where the columns of U_r are the eigenvectors
of W H Wᵀ with the largest eigenvalues, which are the squared singular values of XWᵀ. With S Sᵀ = H, S the Cholesky factor, it
is the truncated SVD of WS times S⁻¹ of SVD-LLM (Wang et al. 2024, §3.1, https://arxiv.org/abs/2403.07378), without an inverse,
so that H may be singular. With H = I it is the truncated SVD of W (Eckart & Young 1936). Where output features have weights
s: [features out], the same is done with diag(s)^½ W, and U_r becomes diag(s)^-½ U_r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spectrum:
    """The principal directions of a layer's output, the largest first; all float64.

    Attributes:
        matrix: diag(s)^½ W, [features out, features in].
        basis: orthonormal columns, [features out, directions].
        energy: Σ over tokens of the square along each, [directions].
        counts: s, [features out]. The number of directions is the smaller of features out and features in.
    """

    matrix: torch.Tensor
    basis: torch.Tensor
    energy: torch.Tensor
    counts: torch.Tensor

    def truncated(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """U, [features out, rank], and V, [rank, features in], of the nearest matrix U V.

        Both have the magnitude of W for any s, so that they do not overflow in float16 when s is far from 1.
        """
        basis, mean = self.basis[:, :rank], self.counts.mean()
        return basis / (self.counts / mean).sqrt()[:, None], basis.T @ self.matrix / mean.sqrt()


def spectrum(weight: torch.Tensor, hessian: torch.Tensor | None = None, counts: torch.Tensor | None = None) -> Spectrum:
    """The spectrum of a matrix, [features out, features in].

    Args:
        hessian: H, [features in, features in], I by default.
        counts: s, [features out], positive, 1 by default.
    """
    counts = torch.ones(len(weight), device=weight.device) if counts is None else counts
    matrix = core = weight.double() * counts.double().sqrt()[:, None]
    basis = None
    if len(weight) > weight.shape[1]:
        # Outputs are in the column space of W, so the directions are computed there, with a smaller matrix.
        basis, core = torch.linalg.qr(matrix)
    energy, directions = torch.linalg.eigh(core @ (core.T if hessian is None else hessian.double() @ core.T))
    directions = directions.flip(1)
    return Spectrum(matrix, directions if basis is None else basis @ directions, energy.flip(0).clamp_min(0), counts.double())


def rank_of(energy: torch.Tensor, keep: float) -> int:
    """The least rank that keeps this fraction of the energy.

    Args:
        energy: [directions], the largest first.
    """
    kept = energy.cumsum(0)
    return min(int((kept < keep * kept[-1]).sum()) + 1, len(kept))


def relative_error(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor | None = None) -> float:
    """‖XWᵀ - XW'ᵀ‖ / ‖XWᵀ‖ for H = XᵀX, or ‖W - W'‖ / ‖W‖ without H; 0 where the denominator is 0."""
    squares = [
        float((matrix * (matrix if hessian is None else matrix @ hessian.double())).sum().clamp_min(0))
        for matrix in (weight.double() - approximation.double(), weight.double())
    ]
    return (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0


@dataclass(frozen=True)
class Curve:
    """The energy and the bytes of each step of ranks of one matrix.

    Attributes:
        gains: energy added by each step, in descending order.
        step_bytes: bytes per step.
        whole_bytes: bytes of the unfactored matrix, which has all the energy.
    """

    gains: torch.Tensor
    step_bytes: int
    whole_bytes: int


def allot(curves: Sequence[Curve], budget_bytes: int) -> list[int | None]:
    """The number of steps of each matrix, at least one, with the most total gain within the budget; None for a whole matrix.

    Steps are taken greedily by gain per byte. The option to keep a matrix whole enters at its slope on the upper hull of the
    curve. Along hulls the greedy order is optimal, apart from the last step that does not fit. O(n log n) in the total number
    of steps.
    """
    steps, left = [1 for _ in curves], budget_bytes - sum(min(curve.step_bytes, curve.whole_bytes) for curve in curves)
    whole = [curve.step_bytes >= curve.whole_bytes for curve in curves]
    offers: list[tuple[float, int, int]] = []
    for index, curve in enumerate(curves):
        if not whole[index]:
            offers += _offers(index, curve)
    for _, index, step in sorted(offers, key=lambda offer: -offer[0]):
        curve = curves[index]
        price = curve.whole_bytes - steps[index] * curve.step_bytes if step == _WHOLE else curve.step_bytes
        if whole[index] or price > left or step not in (_WHOLE, steps[index]):
            continue
        left -= price
        if step == _WHOLE:
            whole[index] = True
        else:
            steps[index] += 1
    return [None if stays else count for stays, count in zip(whole, steps, strict=True)]


_WHOLE = -1
"""Stands for the option to keep the matrix whole, in place of a step."""


def _offers(index: int, curve: Curve) -> list[tuple[float, int, int]]:
    """(gain per byte, index of the matrix, step) of every option after the first step."""
    count = min(len(curve.gains), (curve.whole_bytes - 1) // curve.step_bytes)
    total = curve.gains.double().cumsum(0)
    steps = torch.arange(1, count + 1, device=total.device)
    slopes = (total[-1] - total[:count]) / (curve.whole_bytes - steps * curve.step_bytes)
    prices = (curve.gains[1:count].double() / curve.step_bytes).tolist()
    return [(float(slopes.min()), index, _WHOLE), *((price, index, step + 1) for step, price in enumerate(prices))]
