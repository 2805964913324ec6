"""`lissom::linear_attention`: attention with a kernel feature map, so that its cost is linear in the sequence length.

y_i = φ(q_i) S_i / φ(q_i) z_i,   S_i = Σ_j φ(k_j) v_jᵀ,   z_i = Σ_j φ(k_j)          Katharopoulos et al. 2020, eq. 5 to 12

The sums are over all keys, or with `causal` over j ≤ i. The operands are φ(q) and φ(k), which are not negative. Causal sums are
computed in chunks of C tokens: the sum over earlier chunks is one matrix [features, head_dim] per chunk, and within a chunk the
C × C weights are computed and masked. Hua et al. 2022 (FLASH), §3.2; Yang et al. 2024 (GLA), §2.2.

Sums are computed in float32 or wider. All terms are non-negative, so nothing cancels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define

FLOOR = 1e-30
"""The smallest denominator. Where features do not overlap, or all keys are padding, the sum is zero; the row is then zeros and
not NaN. It is a hundred million times float32's smallest normal number, and far below any meaningful sum of features."""
CHUNK = 64
"""Tokens per chunk. Work within chunks grows with it, and memory for the sums of chunks shrinks: with as many tokens as
features these sums take as much memory as the values."""


def linear_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, chunk: int = CHUNK
) -> torch.Tensor:
    """The reference implementation."""
    _check(q, k, v, causal, chunk)
    heads, groups, tokens = q.shape[1], k.shape[1], q.shape[2]
    q_wide, k_wide, v_wide = _widened(q, k, v)
    if causal:
        return _ratio(_causal_sums(q_wide, k_wide, v_wide, chunk)).to(v.dtype)
    q_wide = q_wide.reshape(q.shape[0], groups, heads // groups * tokens, q.shape[3])
    sums = torch.matmul(q_wide, torch.matmul(k_wide.transpose(-1, -2), v_wide))
    return _ratio(sums).reshape(q.shape[0], heads, tokens, v.shape[3]).to(v.dtype)


def _widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v in the dtype of the sums; v has a further column of ones, which yields the denominator."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, v = (operand.to(dtype) for operand in (q, k, v))
    return q, k, torch.cat([v, v.new_ones(1).expand(*v.shape[:-1], 1)], -1)


def _ratio(sums: torch.Tensor) -> torch.Tensor:
    return sums[..., :-1] / sums[..., -1:].clamp_min(FLOOR)


def _causal_sums(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk: int) -> torch.Tensor:
    """Σ_{j ≤ i} φ(q_i)ᵀφ(k_j) · v_j, [batch, heads, tokens, features of v]."""
    batch, heads, tokens, _ = q.shape
    groups, copies = k.shape[1], heads // k.shape[1]
    chunks = (tokens + chunk - 1) // chunk
    q, k, v = (functional.pad(operand, (0, 0, 0, chunks * chunk - tokens)) for operand in (q, k, v))
    k, v = (operand.reshape(batch, groups, chunks, chunk, operand.shape[-1]) for operand in (k, v))
    # Query heads that share a key head are stacked along tokens, so that k and v are not copied.
    q = q.reshape(batch, groups, copies, chunks, chunk, q.shape[-1]).transpose(2, 3)
    q = q.reshape(batch, groups, chunks, copies * chunk, q.shape[-1])
    states = torch.matmul(k.transpose(-1, -2), v)
    before = functional.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1].cumsum(2)
    seen = torch.ones(chunk, chunk, dtype=q.dtype, device=q.device).tril().repeat(copies, 1)
    sums = torch.matmul(q, before) + torch.matmul(torch.matmul(q, k.transpose(-1, -2)) * seen, v)
    sums = sums.reshape(batch, groups, chunks, copies, chunk, v.shape[-1]).transpose(2, 3)
    return sums.reshape(batch, heads, chunks * chunk, v.shape[-1])[:, :, :tokens]


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, chunk: int) -> None:
    """Raise RuntimeError unless the shapes of the operands fit."""
    shapes = " and ".join(str(list(operand.shape)) for operand in (q, k, v))
    if (
        not q.dim() == k.dim() == v.dim() == 4
        or k.shape[1] == 0
        or q.shape[1] % k.shape[1]
        or q.shape[3] != k.shape[3]
        or k.shape[1] != v.shape[1]
    ):
        raise RuntimeError(
            "lissom::linear_attention takes q [batch, heads, queries, features], k [batch, key_heads, keys, features] and "
            f"v [batch, key_heads, keys, head_dim] with heads a multiple of key_heads, not {shapes}"
        )
    if causal and q.shape[2] != k.shape[2]:
        raise RuntimeError(f"lissom::linear_attention is causal with as many keys as queries, not {shapes}")
    if chunk < 1:
        raise RuntimeError(f"lissom::linear_attention takes chunks of at least one token, not {chunk}")


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False, chunk: int = CHUNK) -> torch.Tensor:
    _check(q, k, v, causal, chunk)
    return v.new_empty(*q.shape[:3], v.shape[3])


def _remember(ctx: Any, inputs: tuple[torch.Tensor, ...], keyword_only_inputs: dict[str, Any], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Recomputes the forward pass and differentiates it: the sums of chunks are not saved."""
    inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
    with torch.enable_grad():
        output = linear_attention_reference(*inputs, **ctx.options)
    return torch.autograd.grad(output, inputs, gradient)


_SUMS = "b g t f v + b g t f + b (g r) q f v + b (g r) q f"
"""Key features times values, and query features times these sums. The denominator counts as one more feature of v."""
_CHUNKS = "b (g r) q chunk f + b (g r) q chunk v + b (g r) q chunk"
"""The triangle within each chunk of causal attention."""

# If it were decomposed at export, the number of chunks would become a symbolic size, which excludes a single chunk.
# If it were decomposed at export, the number of chunks would become a symbolic size, which excludes a single chunk.
linear_attention = define(
    f"linear_attention(Tensor q, Tensor k, Tensor v, *, bool causal=False, int chunk={CHUNK}) -> Tensor",
    linear_attention_reference,
    _fake,
    dimensions=Dimensions(
        f"b (g r) q f, b g t f, b g t v -> b (g r) q v : {_SUMS} if not causal"
        f"| b (g r) !q f, b g !t f, b g t v -> b (g r) q v : {_SUMS} + {_CHUNKS} if causal",
        factors=("v",),
        whole="t",
        positions="q",
    ),
    backward=_backward,
    setup_context=_remember,
)
"""The operator. q: φ(q), [batch, heads, queries, features]; k: φ(k), [batch, key_heads, keys, features], with heads a multiple
of key_heads; v: [batch, key_heads, keys, head_dim]; causal: with as many keys as queries; chunk: tokens. Returns [batch, heads,
queries, head_dim] in v's dtype. Cost is linear in the length. Differentiable; any device."""
