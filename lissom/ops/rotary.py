"""`lissom::rotary`: rotary position embedding, which rotates each pair of features by an angle proportional to the position.

(a, b) -> (a · cos − b · sin, b · cos + a · sin)                Su et al. 2021 (RoFormer), eq. 34

The pairs are the two halves of the features, (i, i + head_dim/2), as in GPT-NeoX and Llama; or neighbours, (2i, 2i + 1), as in
GPT-J and RoFormer.
"""

from __future__ import annotations

import torch

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define


def rotary_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """The reference implementation."""
    half = x.shape[-1] // 2
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    if cos.shape[-1] != x.shape[-1]:
        cos, sin = (table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1) for table in (cos, sin))
    return x * cos + turned * sin


DIMENSIONS = Dimensions(
    "... (p + p), ~... p, ~... p -> ... (p + p) if not interleaved"
    "| ... (p + p), ~... (p + p), ~... (p + p) -> ... (p + p) if not interleaved"
    "| ... (p 2), ~... p, ~... p -> ... (p 2) if interleaved"
    "| ... (p 2), ~... (p 2), ~... (p 2) -> ... (p 2) if interleaved",
    factors=("x",),
)
rotary = define(
    "rotary(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False) -> Tensor", rotary_reference, dimensions=DIMENSIONS
)
"""The operator. x: [..., tokens, head_dim]; cos, sin: broadcast to x, with head_dim features, or one per pair, head_dim/2;
interleaved: whether pairs are neighbours. Returns a tensor like x. Differentiable; any device."""
