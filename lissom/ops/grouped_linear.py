"""Linear layers of experts: rows sorted by group, each multiplied with the stored matrix of its group.

y[i] = x[i] W_gᵀ   for offs[g - 1] ≤ i < offs[g], and zeros for rows after the last group

W_g is stored in a `LinearForm`; its operands have a first dimension of groups, but for the static scale of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lissom.ops.checks import require
from lissom.ops.dimensions import ROWS
from lissom.ops.epilogue import LinearForm, Operand
from lissom.ops.grouped_product import groups_of
from lissom.ops.library import define

_ALL = slice(None)


@dataclass(frozen=True)
class GroupedLinear:
    """The operator `lissom::name_grouped` of a form, without a bias: the layers of a mixture add theirs by themselves."""

    form: LinearForm

    def define(self) -> torch._ops.OpOverload[..., Any]:
        """Define the operator; returns its overload."""
        operands = ", ".join(("Tensor x", *self.form.stored))
        keywords = ", ".join(filter(None, ("Tensor offs", "int features", self.form.option)))
        return define(f"{self.form.name}_grouped({operands}, *, {keywords}) -> Tensor", self.run, self.fake, dimensions=ROWS)

    def run(self, x: torch.Tensor, *given: Operand, offs: torch.Tensor, features: int, **options: Any) -> torch.Tensor:
        """One call of `lissom::name` per group that has rows."""
        layer = getattr(torch.ops.lissom, self.form.name).default
        return self._run(layer, x, given, offs, features, options)

    def reference(self, x: torch.Tensor, *given: Operand, offs: torch.Tensor, features: int, **options: Any) -> torch.Tensor:
        """One call of the reference implementation of `lissom::name` per group that has rows."""
        return self._run(self.form.reference, x, given, offs, features, options)

    def fake(self, x: torch.Tensor, *given: Operand, offs: torch.Tensor, features: int, **options: Any) -> torch.Tensor:
        """The fake kernel."""
        self._check(x, given, offs, features, options)
        return x.new_empty(x.shape[0], features)

    def _run(
        self,
        layer: Callable[..., torch.Tensor],
        x: torch.Tensor,
        given: Sequence[Operand],
        offs: torch.Tensor,
        features: int,
        options: dict[str, Any],
    ) -> torch.Tensor:
        self._check(x, given, offs, features, options)
        result = x.new_zeros(x.shape[0], features)
        for group, rows in groups_of(offs, x.shape[0], f"{self.form.name}_grouped"):
            result[rows] = layer(x[rows], *self._of_group(given, group, rows), features=features, **options)
        return result

    def _check(
        self, x: torch.Tensor, given: Sequence[Operand], offs: torch.Tensor, features: int, options: dict[str, Any]
    ) -> None:
        """Raise unless the operands fit x and offs."""
        require(x.dim() == 2, "x has the sizes {}, and must be [rows, inputs]", x.shape)
        per_row = options.get("granularity") != "tensor"
        require(per_row, "granularity is 'tensor', and must be 'token' or 'group': rows of different groups share no scale")
        require(offs.dim() == 1, "offs has the sizes {}, and must be [groups]", offs.shape)
        whole = not (offs.dtype.is_floating_point or offs.dtype.is_complex or offs.dtype == torch.bool)
        require(whole, "offs is of {}, and must be of an integer dtype", offs.dtype)
        for name, operand in zip(self.form.stored, given, strict=False):
            fits = operand is None or _is_shared(name) or (operand.dim() > 0 and operand.shape[0] == offs.shape[0])
            require(fits, "an operand has the sizes {}, and must be [groups, ...] with {} groups", _sizes(operand), len(offs))
        if len(offs):
            self.form.check(x, *self._of_group(given, 0), features=features, **options)

    def _of_group(self, given: Sequence[Operand], group: int, rows: slice = _ALL) -> list[Operand]:
        """The operands of one group, for these rows of x. PyTorch leaves out those at the end that are None."""
        stored = zip(self.form.stored, [*given, *[None] * (len(self.form.stored) - len(given))], strict=True)
        return [
            None if operand is None else _of_rows(operand, rows) if _is_shared(name) else operand[group]
            for name, operand in stored
        ]


def _is_shared(operand: str) -> bool:
    """True for an operand of all groups: the static scale of x, and its zero point."""
    return " x_" in operand


def _of_rows(operand: torch.Tensor, rows: slice) -> torch.Tensor:
    """The part of a shared operand for these rows: the number for all rows, or one number for each."""
    return operand if rows == _ALL or operand.numel() == 1 else operand[rows]


def _sizes(operand: Operand) -> Sequence[int]:
    return () if operand is None else operand.shape
