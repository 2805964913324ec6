"""Pooling of key or value heads: the pooled head of a group, and the grouping with the least error.

An attention depends on its heads only through the products L_eᵀ·R_i. L_e are the rows of query head e's query projection, or
its columns of the output projection; R_i are the rows of the key or value projection of the head i that e reads. With C the
second moment of the input x, and M that of the input or output of L, replacing R_i by R̄ has the error

    Σ_e ‖M^½ (L_e'ᵀ R̄ − L_eᵀ R_i) C^½‖²                            with S_e = (L_e M L_eᵀ)^½,  B_e = S_e R_i C^½

The best R̄ with as many rows as a head, and the best L_e', come from the eigenvectors of the largest eigenvalues of [B_e B_fᵀ]
(Eckart and Young 1936). Only matrices of size heads · features are decomposed, and no moment is inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch

_RANK = 1e-10
"""Eigenvalues below this fraction of the largest are rounding errors of float64 and count as zero."""


@dataclass(frozen=True)
class Products:
    """The products of an attention's query heads with the key or value heads they read.

    Attributes:
        left: [heads, features, features], L_e M L_eᵀ.
        right: [shared heads, features, inputs], R_i.
        moment: [inputs, inputs], C; the identity where it is None.
        fitted: whether the readers of the heads can be refitted; otherwise R̄ is a mean. All in float64.
    """

    left: torch.Tensor
    right: torch.Tensor
    moment: torch.Tensor | None
    fitted: bool

    @property
    def readers(self) -> int:
        """The number of query heads that read one shared head."""
        return len(self.left) // len(self.right)

    def ordered(self, order: torch.Tensor) -> Products:
        """The products with the shared heads, and their query heads, in another order."""
        return Products(self.left[with_readers(order, self.readers)], self.right[order], self.moment, self.fitted)

    @cached_property
    def gram(self) -> torch.Tensor:
        """R_i C R_jᵀ, [shared heads, shared heads, features, features]."""
        flat = self.right.flatten(0, 1)
        whole = (flat if self.moment is None else flat @ self.moment) @ flat.T
        count, features, _ = self.right.shape
        return whole.unflatten(0, (count, features)).unflatten(2, (count, features)).transpose(1, 2)

    @cached_property
    def energy(self) -> float:
        """Σ_e ‖B_e‖² over all heads."""
        own = self.gram.diagonal().movedim(-1, 0)
        return max(float((self.left * own.repeat_interleave(self.readers, 0)).sum()), 1e-300)

    def pooled(self, heads: Sequence[int]) -> Pooled:
        """The pooled head of these shared heads."""
        chosen = torch.tensor(heads)
        if self.fitted:
            return self._fit(chosen)
        mean, readers = self.right[chosen].mean(0), with_readers(chosen, self.readers)
        off = self.gram[chosen][:, chosen]
        about = off.diagonal().movedim(-1, 0) - off.mean(0) - off.mean(1) + off.mean((0, 1))
        error = float((self.left[readers] * about.repeat_interleave(self.readers, 0)).sum())
        identity = torch.eye(mean.shape[0], dtype=mean.dtype).expand(len(readers), -1, -1)
        return Pooled(mean, identity, error)

    def _fit(self, chosen: torch.Tensor) -> Pooled:
        features = self.right.shape[1]
        root, inverse = (matrix[with_readers(chosen, self.readers)] for matrix in self._roots)
        values, vectors = torch.linalg.eigh(self._balanced(chosen, root))
        values = values.clamp_min(0)
        kept = values[-features:]
        scale = torch.where(kept > _RANK * kept[-1], kept, 0.0).sqrt()
        vectors = vectors[:, -features:]
        right = self.right[chosen].repeat_interleave(self.readers, 0)
        pooled = (vectors * _reciprocal(scale)).T @ (root @ right).flatten(0, 1)
        mix = inverse @ vectors.unflatten(0, (len(root), features)) * scale
        # R̄ gets the magnitude of the heads it replaces: its scale is free, and this one suits reduced precision equally well.
        size = float(right.square().mean().sqrt() / pooled.square().mean().sqrt().clamp_min(1e-300)) or 1.0
        return Pooled(pooled * size, mix / size, float(values[:-features].sum()))

    def pair_errors(self) -> torch.Tensor:
        """The error of pooling each pair of shared heads, [shared heads, shared heads]."""
        count = len(self.right)
        errors = torch.zeros(count, count, dtype=torch.float64)
        for first, second in combinations(range(count), 2):
            errors[first, second] = errors[second, first] = self._pair_error(torch.tensor([first, second]))
        return errors

    def _pair_error(self, pair: torch.Tensor) -> float:
        if not self.fitted:
            return self.pooled(pair.tolist()).error
        values = torch.linalg.eigvalsh(self._balanced(pair, self._roots[0][with_readers(pair, self.readers)]))
        return float(values[: -self.right.shape[1]].clamp_min(0).sum())

    @cached_property
    def _roots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The square roots of the products of readers, and their pseudo-inverses; [heads, features, features]."""
        values, vectors = torch.linalg.eigh(self.left)
        scale = torch.where(values > _RANK * values[..., -1:], values, 0.0).clamp_min(0).sqrt()
        root = (vectors * scale[..., None, :]) @ vectors.mT
        return root, (vectors * _reciprocal(scale)[..., None, :]) @ vectors.mT

    def _balanced(self, chosen: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
        """[B_e B_fᵀ] of the query heads that read these heads, as one matrix."""
        read = chosen.repeat_interleave(self.readers)
        blocks = root[:, None] @ self.gram[read][:, read] @ root[None]
        return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True)
class Pooled:
    """The pooled head of a group.

    Attributes:
        right: [features, inputs], R̄.
        mix: [query heads, features, features], with L_e' = mixᵀ·L_e.
        error: the sum above.
    """

    right: torch.Tensor
    mix: torch.Tensor
    error: float


def with_readers(heads: torch.Tensor, readers: int) -> torch.Tensor:
    """The query heads that read these shared heads, `readers` each."""
    return (heads[:, None] * readers + torch.arange(readers)).flatten()


def arranged(products: Sequence[Products], size: int) -> torch.Tensor:
    """An order of the shared heads in which pooling each `size` neighbours has a small error, [shared heads].

    The error of a group is approximated by the sum over its pairs, relative to the energy of each product. A greedy grouping
    and the original order are both improved by exchanging heads between groups, and the better one is returned.
    """
    count = len(products[0].right)
    costs = torch.zeros(count, count, dtype=torch.float64)
    for product in products:
        costs += product.pair_errors() / product.energy
    starts = [list(torch.arange(count).split(size)), _greedy(costs, size)]
    groupings = [_exchanged(costs, [group.tolist() for group in groups]) for groups in starts]
    best = min(groupings, key=lambda groups: _total(costs, groups))
    return torch.tensor([head for group in sorted(map(sorted, best)) for head in group])


def _greedy(costs: torch.Tensor, size: int) -> list[torch.Tensor]:
    free, groups = list(range(len(costs))), list[torch.Tensor]()
    while free:
        pairs = [(float(costs[a, b]), a, b) for a in free for b in free if a < b]
        group = [*min(pairs)[1:]] if pairs and size > 1 else [free[0]]
        while len(group) < size:
            group.append(min((head for head in free if head not in group), key=lambda head: float(costs[head, group].sum())))
        groups.append(torch.tensor(group))
        free = [head for head in free if head not in group]
    return groups


def _exchanged(costs: torch.Tensor, groups: list[list[int]]) -> list[list[int]]:
    """Groups that no exchange of two heads improves."""
    best, improved = _total(costs, groups), True
    while improved:
        improved = False
        for left, right in combinations(groups, 2):
            for i, j in ((i, j) for i in range(len(left)) for j in range(len(right))):
                left[i], right[j] = right[j], left[i]
                total = _total(costs, groups)
                if total < best * (1 - 1e-9):
                    best, improved = total, True
                else:
                    left[i], right[j] = right[j], left[i]
    return groups


def _total(costs: torch.Tensor, groups: Sequence[Sequence[int]]) -> float:
    return sum(float(costs[list(group)][:, list(group)].sum()) for group in groups)


def _reciprocal(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, 1 / scale.clamp_min(1e-300), 0.0)
