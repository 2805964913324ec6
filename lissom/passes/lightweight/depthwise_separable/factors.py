"""Factors of a kernel as a depthwise followed by a pointwise convolution, or the reverse, and their fit to data.

A kernel K: [channels out, channels in / groups, *sizes], its sizes flattened to t taps, is divided into slices, and each slice
is factored by a singular value decomposition with r terms:

- depthwise first: the slices of input channel i, K[o, i, t] ≈ Σ_ρ P[o, i, ρ] · D[i, ρ, t], o among the outputs of its group;
- pointwise first: the slices of output channel o, K[o, i, t] ≈ Σ_ρ D[o, ρ, t] · P[o, ρ, i], i among the inputs of its group.

Slices are disjoint, so the Frobenius error of K as a whole is least for r terms each. The factor that is applied first is
`first`: [slices, r, columns], the one applied last is `last`: [slices, rows, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lissom.passes.lightweight.depthwise_separable.convolution import Window

Order = Literal["depthwise-first", "pointwise-first"]
ORDERS: tuple[Order, ...] = ("depthwise-first", "pointwise-first")
_SMALLEST = 1e-4
"""Fraction of the mean variance added to the diagonal of a covariance, so that its inverse is well conditioned."""
_LARGEST = 1 << 25
"""Most elements of Σ zzᵀ: 256 MB for both halves."""
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for λ, as fractions of the mean of the diagonal of ZᵀZ."""


@dataclass(frozen=True)
class Layout:
    """The layout of a factored kernel: its order, channels, groups and window, and r, the terms per slice."""

    order: Order
    channels_in: int
    channels_out: int
    groups: int
    window: Window

    @property
    def inputs(self) -> int:
        """Input channels per group."""
        return self.channels_in // self.groups

    @property
    def outputs(self) -> int:
        """Output channels per group."""
        return self.channels_out // self.groups

    @property
    def most_terms(self) -> int:
        """The number of terms with which the factors equal the kernel."""
        columns = self.window.taps if self.order == "depthwise-first" else self.inputs
        return min(columns, self.outputs if self.order == "depthwise-first" else self.window.taps)

    def slices(self, kernel: torch.Tensor) -> torch.Tensor:
        """The kernel as [slices, rows, columns]."""
        if self.order == "pointwise-first":
            return kernel.flatten(2).transpose(1, 2)
        return kernel.reshape(self.groups, self.outputs, self.inputs, -1).transpose(1, 2).flatten(0, 1)

    def kernel(self, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The kernel that both convolutions amount to.

        Args:
            first: as returned by `weights`.
            last: as returned by `weights`.
        """
        if self.order == "pointwise-first":
            parts = first.reshape(self.channels_out, -1, self.inputs), last.flatten(2)
            return torch.einsum("ori,ort->oit", *parts).unflatten(-1, self.window.size)
        depthwise = first.reshape(self.groups, self.inputs, -1, self.window.taps)
        pointwise = last.reshape(self.groups, self.outputs, self.inputs, -1)
        return torch.einsum("goir,girt->goit", pointwise, depthwise).flatten(0, 1).unflatten(-1, self.window.size)

    def weights(self, first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both factors as kernels, of the first and of the last convolution.

        Depthwise first: [r · channels in, 1, *sizes] and [channels out, r · channels in / groups, 1, …].
        Pointwise first: [r · channels out, channels in / groups, 1, …] and [channels out, r, *sizes].
        """
        ones = (1,) * len(self.window.size)
        if self.order == "pointwise-first":
            pointwise = first.reshape(-1, self.inputs, *ones)
            return pointwise, last.transpose(1, 2).unflatten(-1, self.window.size).contiguous()
        depthwise = first.reshape(-1, 1, *self.window.size)
        mixing = last.reshape(self.groups, self.inputs, self.outputs, -1).transpose(1, 2)
        return depthwise, mixing.reshape(self.channels_out, -1, *ones)

    @property
    def first_groups(self) -> int:
        """Groups of the first convolution."""
        return self.channels_in if self.order == "depthwise-first" else self.groups

    @property
    def last_groups(self) -> int:
        """Groups of the last convolution."""
        return self.groups if self.order == "depthwise-first" else self.channels_out


def decompose(slices: torch.Tensor, root: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S, Vt of each slice, multiplied by the root of the covariance of its columns' inputs where that is given.

    Args:
        slices: [slices, rows, columns].
        root: [slices, columns, columns].
    """
    slices = slices.double()
    return torch.linalg.svd(slices if root is None else slices @ root, full_matrices=False)


def factors(
    decomposition: tuple[torch.Tensor, torch.Tensor, torch.Tensor], terms: int, inverse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `first` and `last` with this number of terms, of equal norm.

    Args:
        inverse: of the root given to `decompose`.
    """
    u, s, vt = decomposition
    first, last = vt[:, :terms], u[:, :, :terms] * s[:, None, :terms]
    if inverse is not None:
        first = first @ inverse
    sizes = last.norm(dim=1) / first.norm(dim=2).clamp_min(1e-300)
    balance = torch.where(sizes > 0, sizes, 1).sqrt()
    return first * balance[:, :, None], last / balance[:, None, :]


def energy(values: torch.Tensor) -> torch.Tensor:
    """The fraction of the energy of all slices that 1, 2, … terms keep, [terms].

    Args:
        values: S, [slices, terms].
    """
    held = values.square().sum(0).cumsum(0)
    return held / held[-1] if held[-1] > 0 else torch.ones_like(held)


def roots(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric roots of covariances, and the inverses of these.

    Args:
        covariance: sums of products, [n, columns, columns].
    """
    mean = covariance.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30)
    spread = _SMALLEST * mean[:, None, None] * torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    values, vectors = torch.linalg.eigh(covariance + spread)
    values = values.clamp_min(0.5 * _SMALLEST * mean[:, None])[:, None, :].sqrt()
    return vectors * values @ vectors.mT, vectors / values @ vectors.mT


def covariance(layout: Layout, value: torch.Tensor) -> torch.Tensor:
    """Σ zzᵀ over all positions of the inputs z of slices: [channels in, taps, taps], or [groups, inputs, inputs].

    Args:
        value: [batch, channels in, *sizes].
    """
    if layout.order == "depthwise-first":
        met = layout.window.patches(value).transpose(0, 1).flatten(1, 2)
    else:
        met = value.flatten(2).unflatten(1, (layout.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    met = met.double()
    return met.mT @ met


def of_slices(layout: Layout, each: torch.Tensor) -> torch.Tensor:
    """Matrices of each input channel, or of each group, repeated for every slice."""
    return each if layout.order == "depthwise-first" else each.repeat_interleave(layout.outputs, 0)


@dataclass
class Fit:
    """Sums for the least squares of the last convolution's kernel W, each group of it a matrix [features, outputs].

    With z the input patch of the last convolution at a position, [features], y the target output there, and e the residual
    y - W₀·z, with W₀ the initial last kernel, [outputs]: Σ zzᵀ, Σ zeᵀ and Σ eᵀe are kept for two halves of the data
    separately, so that a fit to one is evaluated on the other; and Σ yᵀy. Sums of e instead of y avoid cancellation where W₀
    is nearly exact.

    Attributes:
        first: the initial first kernel.
        last: the initial last kernel.
    """

    layout: Layout
    first: torch.Tensor
    last: torch.Tensor
    gram: list[torch.Tensor | float] = field(default_factory=lambda: [0.0, 0.0])
    product: list[torch.Tensor | float] = field(default_factory=lambda: [0.0, 0.0])
    left: list[float] = field(default_factory=lambda: [0.0, 0.0])
    power: float = 0.0

    @property
    def start(self) -> torch.Tensor:
        """W₀, [groups, features, outputs]."""
        outputs = len(self.last) // self.layout.last_groups
        return self.last.reshape(self.layout.last_groups, outputs, -1).mT

    @property
    def is_too_large(self) -> bool:
        """True where Σ zzᵀ would take too much memory and time, so that W₀ stays."""
        groups, features, _ = self.start.shape
        return groups * features * features > _LARGEST

    def add(self, value: torch.Tensor, wanted: torch.Tensor, half: int | None) -> None:
        """Add a sample to half 0 or 1; a single sample is split, the first half of its positions to 0 and the rest to 1.

        Args:
            value: [1, channels in, *sizes].
            wanted: [1, channels out, *sizes], without bias.
        """
        # Sums of half precision lose what is small, and overflow.
        value, wanted = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (value, wanted))
        z = self._met(value)
        y = wanted.flatten(2)[0].unflatten(0, (z.shape[0], -1)).mT
        e = y - z @ self.start.to(z.dtype)
        self.power += float(y.double().square().sum())
        middle = z.shape[1] // 2
        halves = ((0, slice(None, middle)), (1, slice(middle, None))) if half is None else ((half, slice(None)),)
        for half, part in halves:
            self.left[half] += float(e[:, part].double().square().sum())
            if not self.is_too_large:
                self.gram[half] = self.gram[half] + z[:, part].mT @ z[:, part]
                self.product[half] = self.product[half] + z[:, part].mT @ e[:, part]

    def solve(self) -> tuple[torch.Tensor, float]:
        """argmin over W of Σ ‖W·z - y‖² + λ ‖W - W₀‖², and its relative error on data it was not fitted to.

        λ minimizes the error of a fit to half of the data on the other half; W₀ stays where no λ beats it. Few or similar
        positions do not determine W in all directions; λ keeps W₀ in the others.
        """
        least, best_ridge = 0.0, None
        gram, product = self._sums(self.gram), self._sums(self.product)
        for ridge in _RIDGES if gram else ():
            changes = [_ridge(gram[half], product[half], ridge) for half in (0, 1)]
            # Σ ‖Δᵀz - e‖² - Σ ‖e‖² of the other half.
            gained = sum(
                float(((gram[half] @ changes[1 - half] - 2 * product[half]) * changes[1 - half]).sum()) for half in (0, 1)
            )
            if gained < least:
                least, best_ridge = gained, ridge
        error = (max(sum(self.left) + least, 0.0) / max(self.power, 1e-300)) ** 0.5
        if best_ridge is None:
            return self.last, error
        fitted = self.start + _ridge(gram[0] + gram[1], product[0] + product[1], best_ridge)
        return fitted.mT.reshape(self.last.shape), error

    def _met(self, value: torch.Tensor) -> torch.Tensor:
        """z at every position: [groups, positions, features]."""
        layout, window = self.layout, self.layout.window
        rank, first = len(window.size), self.first.to(value.dtype)
        ones, zeros = (1,) * rank, (0,) * rank
        if layout.order == "depthwise-first":
            padded = torch.nn.functional.pad(value, [side for pair in reversed(window.padding) for side in pair])
            steps = window.stride, zeros, window.dilation
            given = torch.convolution(padded, first, None, *steps, False, zeros, layout.first_groups)
            return given.flatten(2)[0].unflatten(0, (layout.groups, -1)).mT
        given = torch.convolution(value, first, None, ones, zeros, ones, False, zeros, layout.first_groups)
        met = window.patches(given)[0].unflatten(0, (layout.channels_out, -1))
        return met.transpose(1, 2).flatten(2)

    @staticmethod
    def _sums(sums: Sequence[torch.Tensor | float]) -> list[torch.Tensor]:
        """The sums of the two halves; empty where one half has no data."""
        halves = [half.double() for half in sums if isinstance(half, torch.Tensor)]
        return halves if len(halves) == 2 else []


def _ridge(gram: torch.Tensor, product: torch.Tensor, ridge: float) -> torch.Tensor:
    """argmin over Δ of Σ ‖Δᵀz - e‖² + ridge · mean(diag Σ zzᵀ) · ‖Δ‖² for each group; [groups, features, outputs]."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-30)
    damped = gram + ridge * mean[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    # A group whose sums are too ill-conditioned for so small a ridge keeps W₀.
    return torch.where(failed[:, None, None] == 0, torch.cholesky_solve(product, factor).nan_to_num(), 0)
