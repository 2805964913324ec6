"""Feature maps of linear attention, and their agreement with softmax.

a_ij = φ(q_i) · φ(k_j) / Σ_j φ(q_i) · φ(k_j)   approximates   p_ij = softmax_j(scale · q_i · k_j)

- elu: φ(x) = elu(s · x) + 1, one s per head.                                       Katharopoulos et al. 2020, eq. 7
- relu: φ(x) = max(x, 0). A factor on x cancels, so there is none.
- hedgehog: φ(x) = [exp(x W + b), exp(-x W - b)], W and b per head, for q and k.    Zhang et al. 2024, eq. 6

Learned parameters are fitted to p on observed queries and keys: s by grid search, W and b by Adam. The loss is the
Kullback-Leibler divergence, the mean of Σ_j p_ij log(p_ij / a_ij) over observed rows (Zhang et al., eq. 8, use the cross
entropy, which differs from it by a constant).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

FeatureMap = Literal["elu", "relu", "hedgehog"]

LARGEST_EXPONENT = 30.0
"""The bound on exponents of keys: sums of 10⁵ products with exp(±30) stay well inside float32's range. A maximum of keys would
cancel in the ratio, as that of a query's features does, but a causal sum does not know the later keys."""
_SCALES = tuple(2.0 ** (power / 2) for power in range(-6, 7))
_STEPS = 300
_RATE = 0.02
_LEAST = 1e-9
"""The least weight of which a logarithm is taken; `relu` gives weights of zero."""


@dataclass(frozen=True)
class Observed:
    """Queries and keys of one sample, and their softmax weights.

    Attributes:
        q: [batch, heads, rows, head_dim].
        k: [batch, key_heads, keys, head_dim].
        seen: the visible keys of each row, broadcast to [batch, heads, rows, keys].
        real: rows that are not padding, [batch, rows].
        weights: [batch, heads, rows, keys].
    """

    q: torch.Tensor
    k: torch.Tensor
    seen: torch.Tensor
    real: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Maps:
    """The learned parameters of a feature map.

    Attributes:
        matrices: W of queries and of keys, [heads, head_dim, head_dim] and [key_heads, …].
        biases: b, [heads, 1, head_dim] and [key_heads, …].
        factors: s, [heads, 1, 1] and [key_heads, 1, 1]. Empty where a map has none.
    """

    matrices: tuple[torch.Tensor, ...] = ()
    biases: tuple[torch.Tensor, ...] = ()
    factors: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """The agreement of linear attention with softmax, as means over rows and heads.

    The softmax mass on the same keys, Σ_j min(p_j, a_j), and the divergence Σ_j p_j log(p_j / a_j) in nats."""

    mass: float
    divergence: float


def observe_weights(q: torch.Tensor, k: torch.Tensor, scale: float, *, seen: torch.Tensor, real: torch.Tensor) -> Observed:
    """The softmax weights for some rows of queries; the shapes are those of `Observed`."""
    scores = q.float() @ _repeated(k.float(), q.shape[1]).transpose(-1, -2) * scale
    # A row without visible keys has no distribution and does not count.
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return Observed(q.float(), k.float(), seen, real & seen.any(-1).reshape(len(seen), -1).expand(real.shape), weights)


def initial_maps(features: FeatureMap, shape: tuple[int, int, int], scale: float, device: torch.device) -> Maps:
    """Maps before fitting: W = √scale · I, so that φ grows with the scores.

    Args:
        shape: heads, key_heads, head_dim.
    """
    heads, key_heads, head_dim = shape
    if features != "hedgehog":
        return Maps()
    identity = torch.eye(head_dim, device=device) * math.sqrt(abs(scale))
    sides = (identity, identity if scale >= 0 else -identity)
    return Maps(
        tuple(side.repeat(count, 1, 1) for side, count in zip(sides, (heads, key_heads), strict=True)),
        tuple(torch.zeros(count, 1, head_dim, device=device) for count in (heads, key_heads)),
    )


def query_features(features: FeatureMap, maps: Maps, q: torch.Tensor) -> torch.Tensor:
    """φ(q); `hedgehog` divides each row by its largest feature, which cancels in the ratio."""
    x = _changed(maps, 0, q)
    if features != "hedgehog":
        return functional.elu(x) + 1 if features == "elu" else x.relu()
    return (torch.cat([x, -x], -1) - x.abs().amax(-1, keepdim=True)).exp()


def key_features(features: FeatureMap, maps: Maps, k: torch.Tensor) -> torch.Tensor:
    """φ(k)."""
    x = _changed(maps, 1, k)
    if features != "hedgehog":
        return functional.elu(x) + 1 if features == "elu" else x.relu()
    x = x.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.cat([x, -x], -1).exp()


def fit_maps(features: FeatureMap, maps: Maps, data: Sequence[Observed]) -> Maps:
    """Maps fitted to minimize the divergence from softmax on this data."""
    if features == "relu":
        return maps
    return _fit_factors(data) if features == "elu" else _fit_projections(maps, data)


def agreement(features: FeatureMap, maps: Maps, data: Sequence[Observed]) -> Agreement:
    """The agreement of these maps with softmax on this data."""
    rows = masses = divergences = 0.0
    for observed in data:
        weights = _weights(features, maps, observed)
        real = observed.real[:, None].expand(weights.shape[:-1])
        masses += float(torch.minimum(weights, observed.weights).sum(-1)[real].sum())
        divergences += float(_divergence(observed.weights, weights)[real].sum())
        rows += int(real.sum())
    return Agreement(masses / max(rows, 1), max(divergences, 0.0) / max(rows, 1))


def _fit_factors(data: Sequence[Observed]) -> Maps:
    """The best factor of each key head, and of the query heads that read it, on a grid of half powers of two."""
    heads, key_heads = data[0].q.shape[1], data[0].k.shape[1]
    device = data[0].q.device
    by_scale = [
        sum(
            _divergence_of_heads("elu", _factors(torch.full((key_heads,), scale, device=device), heads), observed)
            for observed in data
        )
        for scale in _SCALES
    ]
    losses = torch.stack([loss.reshape(key_heads, -1).sum(1) for loss in by_scale if isinstance(loss, torch.Tensor)])
    return _factors(torch.tensor(_SCALES, device=device)[losses.argmin(0)], heads)


def _factors(scales: torch.Tensor, heads: int) -> Maps:
    per_head = scales.repeat_interleave(heads // len(scales))
    return Maps(factors=(per_head[:, None, None], scales[:, None, None]))


def _fit_projections(maps: Maps, data: Sequence[Observed]) -> Maps:
    """Fit W and b by Adam, one sample per step, with cosine decay of the learning rate to zero."""
    learned = [tensor.clone().requires_grad_() for tensor in (*maps.matrices, *maps.biases)]
    optimizer = torch.optim.Adam(learned, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    current = Maps(tuple(learned[:2]), tuple(learned[2:]))
    for step in range(_STEPS):
        with torch.enable_grad():
            loss = _divergence_of_heads("hedgehog", current, data[step % len(data)]).sum()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        schedule.step()
    fitted = [tensor.detach() for tensor in learned]
    return Maps(tuple(fitted[:2]), tuple(fitted[2:]))


def _divergence_of_heads(features: FeatureMap, maps: Maps, observed: Observed) -> torch.Tensor:
    """The mean over real rows, [heads]."""
    real = observed.real[:, None].to(observed.weights.dtype)
    divergence = _divergence(observed.weights, _weights(features, maps, observed)) * real
    return divergence.sum((0, 2)) / real.sum().clamp_min(1)


def _weights(features: FeatureMap, maps: Maps, observed: Observed) -> torch.Tensor:
    """a, [batch, heads, rows, keys]."""
    k = _repeated(key_features(features, maps, observed.k), observed.q.shape[1])
    products = (query_features(features, maps, observed.q) @ k.transpose(-1, -2)).masked_fill(~observed.seen, 0.0)
    return products / products.sum(-1, keepdim=True).clamp_min(torch.finfo(products.dtype).tiny)


def _divergence(p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Σ_j p_j log(p_j / a_j), [batch, heads, rows]."""
    return (torch.special.xlogy(p, p) - p * a.clamp_min(_LEAST).log()).sum(-1)


def _changed(maps: Maps, side: int, x: torch.Tensor) -> torch.Tensor:
    if maps.matrices:
        return x @ maps.matrices[side] + maps.biases[side]
    return x * maps.factors[side] if maps.factors else x


def _repeated(k: torch.Tensor, heads: int) -> torch.Tensor:
    """Key heads, each repeated for the query heads that read it."""
    return k.repeat_interleave(heads // k.shape[1], 1)
