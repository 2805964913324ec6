"""`lissom::packed_linear` and `lissom::packed_linear_norm`: a linear layer and what surrounds it, its weight packed.

y = activation(x Wᵀ + b) + other, or activation(x Wᵀ + b) · other
z = layer_norm(x Wᵀ + b + other)

`lissom::packed_embedding` looks up rows of such a weight, so that an output head tied to the table of embeddings is held once.

A packed weight holds panels of 32 output features. For float32 it is [panels, inputs, 32]; for bfloat16, whose instruction
takes two values at once along the summed axis, [panels, inputs / 2, 32, 2]. Features are filled up with zeros to whole panels.
It is an ordinary tensor, so it can be stored, moved and unpacked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

PANEL = 32

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}

_LIBRARY = torch.library.Library("lissom", "FRAGMENT")
_LIBRARY.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? other=None, *, "
    'int features, str activation="none", str combine="add") -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "packed_linear_norm(Tensor x, Tensor weight, Tensor? bias=None, Tensor? other=None, Tensor? norm_weight=None, "
    "Tensor? norm_bias=None, *, int features, float eps) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "packed_embedding(Tensor weight, Tensor indices, *, int features, int bits) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """The packed form of a weight [features, inputs], float32 or bfloat16; bfloat16 needs an even number of inputs."""
    features, inputs = weight.shape
    panels = -(-features // PANEL)
    filled = functional.pad(weight, (0, 0, 0, panels * PANEL - features)).view(panels, PANEL, inputs)
    if weight.dtype == torch.bfloat16:
        return filled.view(panels, PANEL, inputs // 2, 2).transpose(1, 2).contiguous()
    return filled.transpose(1, 2).contiguous()


def unpack(packed: torch.Tensor, features: int) -> torch.Tensor:
    """The weight [features, inputs] a packed one was made from."""
    return packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, -1)[:features]


def packed_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    *,
    features: int,
    activation: str = "none",
    combine: str = "add",
) -> torch.Tensor:
    """The operator in PyTorch's own."""
    y = ACTIVATIONS[activation](functional.linear(x, unpack(weight, features), bias))
    if other is None:
        return y
    return y * other if combine == "mul" else y + other


def packed_linear_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    *,
    features: int,
    eps: float,
) -> torch.Tensor:
    """The operator in PyTorch's own."""
    y = packed_linear_reference(x, weight, bias, other, features=features)
    return functional.layer_norm(y, (features,), norm_weight, norm_bias, eps)


def packed_embedding_reference(weight: torch.Tensor, indices: torch.Tensor, *, features: int, bits: int) -> torch.Tensor:
    """The operator in PyTorch's own."""
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= features):
        raise IndexError(f"index out of range in packed_embedding, which has rows 0 to {features - 1}")
    panel, column = indices // PANEL, indices % PANEL
    if bits > 4:
        return weight[panel, :, column].flatten(indices.dim())
    single = (weight[panel, :, column % (PANEL // 2)] >> (column // (PANEL // 2) * 4).to(torch.uint8).unsqueeze(-1)) & 15
    low, high = single.unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


_LIBRARY.impl("packed_linear", packed_linear_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_linear_norm", packed_linear_norm_reference, "CompositeExplicitAutograd")
_LIBRARY.impl("packed_embedding", packed_embedding_reference, "CompositeExplicitAutograd")


def _shape_of(x: torch.Tensor, *_: object, features: int, **__: object) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], features))


torch.library.register_fake("lissom::packed_linear", _shape_of, lib=_LIBRARY)
torch.library.register_fake("lissom::packed_linear_norm", _shape_of, lib=_LIBRARY)


def _rows_of(weight: torch.Tensor, indices: torch.Tensor, *, features: int, bits: int) -> torch.Tensor:
    inputs = weight.shape[1] * (weight.shape[3] if weight.dim() == 4 else 1)
    return weight.new_empty((*indices.shape, inputs if bits > 4 else inputs // 2))


torch.library.register_fake("lissom::packed_embedding", _rows_of, lib=_LIBRARY)

packed_linear = torch.ops.lissom.packed_linear.default
"""The operator. x: [..., inputs]; weight: packed; bias: [features]; other: [..., features], like the result; features: of the
result; activation: a name in ACTIVATIONS; combine: `add` or `mul`. Returns [..., features], of x's dtype."""

packed_linear_norm = torch.ops.lissom.packed_linear_norm.default
"""The same with a layer norm over the features behind it; norm_weight, norm_bias: [features]."""

packed_embedding = torch.ops.lissom.packed_embedding.default
"""The rows `indices`, whole numbers of any shape, of a packed weight: [..., inputs], of the weight's dtype. features: how many
rows there are. bits: of a number; with 4, where a weight is [panels, inputs, 16] bytes, two share one, the first of them low:
[..., inputs / 2]. Raises: IndexError for a row that is not there."""
