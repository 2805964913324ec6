"""Functions that replace some operators in the eager backend: faster ways to call them, and checks they lack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from lissom.compiler.ir.operators import RECURRENT_LAYERS
from lissom.ops import IMPLEMENTATIONS

aten = torch.ops.aten


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
    """PyTorch's attention with a check of lengths: on a CPU it reads past the end of the shorter of k and v (torch 2.13).

    Raises:
        ValueError: which needs no second run for an explanation.
    """
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"attention has {key.shape[-2]} keys and {value.shape[-2]} values")
    return functional.scaled_dot_product_attention(query, key, value, *rest, **options)


def _batch_norm(input: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PyTorch's batch norm with a check of sizes: it reads past the end of too short arguments (torch 2.13)."""
    for given in (*rest, *options.values()):
        if isinstance(given, torch.Tensor) and given.shape != input.shape[1:2]:
            raise ValueError(f"batch norm has {list(given.shape)} for {input.shape[1]} channels")
    return aten._native_batch_norm_legit_no_training.default(input, *rest, **options)


def _recurrent_layers(target: torch._ops.OpOverload, gates: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """PyTorch's LSTM, GRU or RNN with a check of sizes: oneDNN reads past the end of too short weights (torch 2.13).

    Args:
        gates: how many matrices of a step lie in one weight.
    """

    def run(
        input: torch.Tensor,
        hx: torch.Tensor | Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[torch.Tensor, ...]:
        states = [hx] if isinstance(hx, torch.Tensor) else hx
        ways = 2 if bidirectional else 1
        shapes = [tuple(tensor.shape) for tensor in (input, *states, *params)]
        if any(len(shape) != 3 for shape in shapes[: 1 + len(states)]) or not 0 < num_layers * ways <= len(params):
            raise ValueError(f"{target} of {num_layers} layers has an input, states and weights of {shapes}")
        hidden, cell = states[0].shape[-1], states[-1].shape[-1]
        expected = [(num_layers * ways, input.shape[1 - batch_first], state.shape[-1]) for state in states]
        for layer in range(num_layers):
            features = input.shape[-1] if layer == 0 else hidden * ways
            weights = [(gates * cell, features), (gates * cell, hidden)]
            expected += (weights + [(gates * cell,)] * 2 * has_biases + [(hidden, cell)] * (hidden != cell)) * ways
        if shapes[1:] != expected:
            raise ValueError(f"{target} has states and weights of {shapes[1:]}, and not {expected}")
        return target(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)

    return run


# A tensor method takes half the time of its operator to call, which matters for small models.
METHODS: dict[object, Callable[..., object]] = {
    aten.scaled_dot_product_attention.default: _attention,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    **{target: _recurrent_layers(target, gates) for target, gates in RECURRENT_LAYERS.items()},
    # A program from a file may return uninitialized memory.
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.transpose.int: torch.Tensor.transpose,
    aten.select.int: torch.Tensor.select,
    **{
        getattr(aten, name).default: getattr(torch.Tensor, name)
        for name in ("reshape", "view", "permute", "unsqueeze", "expand", "split_with_sizes")
    },
    aten.sym_size.int: torch.Tensor.size,
    **IMPLEMENTATIONS,
}
