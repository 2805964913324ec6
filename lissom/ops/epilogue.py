"""Linear layers with a fused epilogue: the part that is the same for every form of a stored weight.

y = activation(x Wᵀ + b) + other, or activation(x Wᵀ + b) · other
z = layer_norm(x Wᵀ + b + other)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from lissom.ops.checks import cast, check_floats, require
from lissom.ops.dimensions import ROWS, Dimensions
from lissom.ops.library import define
from lissom.ops.squared_relu import squared_relu_reference

PANEL = 32
"""Output features of a panel of a packed weight."""

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "squared_relu": squared_relu_reference,
}

Operand = torch.Tensor | None


def in_panels(weight: torch.Tensor, step: int = 1) -> torch.Tensor:
    """A weight [features, inputs] as [panels, 32, steps, step]: a view, or a copy filled with zeros."""
    panels, steps = -(-weight.shape[0] // PANEL), -(-weight.shape[1] // step)
    if weight.shape != (panels * PANEL, steps * step):
        weight = functional.pad(weight, (0, steps * step - weight.shape[1], 0, panels * PANEL - weight.shape[0]))
    return weight.unflatten(0, (panels, PANEL)).unflatten(2, (steps, step))


@dataclass(frozen=True)
class LinearForm:
    """A form in which the operators `lissom::name` and `lissom::name_norm` store the weight of a linear layer.

    Attributes:
        stored: the operands that hold it, as in a schema.
        option: a further keyword argument, or empty.
        check: raises unless these operands fit x, called as `check(x, *stored, features=…, option=…)`.
        product: x Wᵀ + b, called as `product(x, *stored, bias, features=…, option=…)`.
        dimensions: the declaration of both operators.
    """

    name: str
    stored: Sequence[str]
    option: str
    check: Callable[..., None]
    product: Callable[..., torch.Tensor]
    dimensions: Dimensions = ROWS

    def define(self) -> None:
        """Define both operators."""
        operands = ", ".join(("Tensor x", *self.stored, "Tensor? bias=None", "Tensor? other=None"))
        keywords = ", ".join(filter(None, ("int features", self.option)))
        epilogue = 'str activation="none", str combine="add"'
        norm = "Tensor? norm_weight=None, Tensor? norm_bias=None"
        normed = f"{self.name}_norm({operands}, {norm}, *, {keywords}, float eps) -> Tensor"
        for schema in (f"{self.name}({operands}, *, {keywords}, {epilogue}) -> Tensor", normed):
            define(schema, self.reference, self.fake, dimensions=self.dimensions)

    def reference(
        self,
        x: torch.Tensor,
        *given: Operand,
        features: int,
        activation: str = "none",
        combine: str = "add",
        eps: float | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """The reference implementation of both; with `eps` that of the operator with a norm."""
        *weight, bias, other, gain, shift = self._checked(x, given, features, (activation, combine), options)
        y = ACTIVATIONS[activation](self.product(x, *weight, bias, features=features, **options))
        if other is not None:
            y = y * other.to(y.dtype) if combine == "mul" else y + other.to(y.dtype)
        y = y.to(x.dtype)
        return y if eps is None else functional.layer_norm(y, (features,), cast(gain, x.dtype), cast(shift, x.dtype), eps)

    def fake(self, x: torch.Tensor, *given: Operand, features: int, **options: Any) -> torch.Tensor:
        """The fake kernel of both."""
        epilogue = options.pop("activation", "none"), options.pop("combine", "add")
        options.pop("eps", None)
        self._checked(x, given, features, epilogue, options)
        return x.new_empty((*x.shape[:-1], features))

    def _checked(
        self, x: torch.Tensor, given: Sequence[Operand], features: int, epilogue: tuple[str, str], options: Any
    ) -> list[Any]:
        """The operands after x, of which PyTorch leaves out those at the end that are None. Raises unless they fit."""
        activation, combine = epilogue
        *weight, bias, other, gain, shift = [*given, *[None] * (len(self.stored) + 4 - len(given))]
        require(x.dim() >= 1, "x is a scalar, and must be [..., inputs]")
        require(features >= 0, "the number of features is {}, and must not be negative", features)
        require(activation in ACTIVATIONS, "the activation is '{}', and must be one of {}", activation, ", ".join(ACTIVATIONS))
        require(combine in ("add", "mul"), "combine is 'add' or 'mul', not '{}'", combine)
        for operand in (bias, gain, shift):
            check_floats(operand, (features,), "a bias or a norm's weight")
        check_floats(other, (*x.shape[:-1], features), "the other operand")
        self.check(x, *weight, features=features, **options)
        return [*weight, bias, other, gain, shift]
