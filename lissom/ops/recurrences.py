"""`lissom::gated_delta_rule` and `lissom::selective_scan`: the recurrences of linear-time layers, each with its state.

The gated delta rule (Yang et al. 2025, Gated Delta Networks, eq. 10; Kimi Linear has one decay per key feature):

S_t = diag(exp(g_t)) S_{t−1} + β_t k_t (v_t − (diag(exp(g_t)) S_{t−1})ᵀ k_t)ᵀ,   y_t = S_tᵀ q_t

The selective scan (Gu and Dao 2023, Mamba; Dao and Gu 2024, Mamba-2, where A is one number per head):

S_t = exp(Δ_t A) S_{t−1} + Δ_t x_t B_tᵀ,   y_t = S_t C_t + D x_t

Both are computed in float32 or wider, token by token. The kernels in `native/recurrences.h` keep a few columns of the state in
the cache for all tokens, since columns do not depend on each other.
"""

from __future__ import annotations

from typing import Any

import torch

from lissom.ops.checks import require
from lissom.ops.dimensions import Dimensions
from lissom.ops.library import define

EPS = 1e-6
"""Added to the squared length of queries and keys that are normalized, as the published kernels do."""

Pair = tuple[torch.Tensor, torch.Tensor]


def gated_delta_rule_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    scale: float,
    normalizes: bool,
) -> Pair:
    """The reference implementation."""
    sizes = _check_delta_rule(query, key, value, decay, beta, state)
    dtype, copies = _wide(value), value.shape[2] // key.shape[2]
    query, key = (_prepared(operand, dtype, copies, normalizes) for operand in (query, key))
    query = query * scale
    forget = (decay.unsqueeze(-1) if decay.dim() == 3 else decay).to(dtype).exp()
    wide, rate = value.to(dtype), beta.to(dtype)
    kept = _started(state, sizes, dtype, value)
    outputs: list[torch.Tensor] = []
    for token in range(value.shape[1]):
        q, k = query[:, token], key[:, token]
        kept = kept * forget[:, token].unsqueeze(-1)
        error = (wide[:, token] - torch.einsum("bhkv,bhk->bhv", kept, k)) * rate[:, token].unsqueeze(-1)
        kept = kept + k.unsqueeze(-1) * error.unsqueeze(-2)
        outputs.append(torch.einsum("bhkv,bhk->bhv", kept, q))
    return _stacked(outputs, value), kept


def selective_scan_reference(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> Pair:
    """The reference implementation."""
    sizes = _check_scan(x, step, a, b, c, d, state)
    dtype, copies = _wide(x), x.shape[2] // b.shape[2]
    b, c = (operand.to(dtype).repeat_interleave(copies, 2) for operand in (b, c))
    wide, step, rates = x.to(dtype), step.to(dtype), a.to(dtype)
    kept = _started(state, sizes, dtype, x)
    outputs: list[torch.Tensor] = []
    for token in range(x.shape[1]):
        now = step[:, token].unsqueeze(-1)
        forget = (now * (rates.unsqueeze(-1) if rates.dim() == 1 else rates)).exp().unsqueeze(2)
        kept = kept * forget + (now * wide[:, token]).unsqueeze(-1) * b[:, token].unsqueeze(2)
        output = torch.einsum("bhpn,bhn->bhp", kept, c[:, token])
        outputs.append(output if d is None else output + wide[:, token] * d.to(dtype).unsqueeze(-1))
    return _stacked(outputs, x), kept


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _prepared(x: torch.Tensor, dtype: torch.dtype, copies: int, normalizes: bool) -> torch.Tensor:
    """Queries or keys in the dtype of the sums, one head for each head of the values."""
    x = x.to(dtype)
    if normalizes:
        x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS)
    return x.repeat_interleave(copies, 2)


def _started(state: torch.Tensor | None, sizes: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """The state before the first token; a copy, since an operator's result is not one of its operands."""
    return like.new_zeros(sizes, dtype=dtype) if state is None else state.to(dtype, copy=True)


def _stacked(outputs: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.stack(outputs, 1).to(like.dtype) if outputs else like.new_empty(like.shape)


def _check_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[int, ...]:
    """The sizes of the state. Raises RuntimeError unless the shapes of the operands fit."""
    name = "lissom::gated_delta_rule"
    fits = query.dim() == key.dim() == value.dim() == 4
    require(
        fits,
        name + " takes queries, keys and values of four dimensions, not {}, {} and {}",
        query.dim(),
        key.dim(),
        value.dim(),
    )
    fits = query.shape == key.shape and key.shape[:2] == value.shape[:2]
    require(fits, name + " takes queries and keys {} like each other and the tokens of the values {}", key.shape, value.shape)
    fits = key.shape[2] > 0 and value.shape[2] % key.shape[2] == 0
    require(
        fits, name + " takes a number of value heads, {}, that is a multiple of the key heads, {}", value.shape[2], key.shape[2]
    )
    fits = beta.shape == value.shape[:3] and decay.shape in (value.shape[:3], (*value.shape[:3], key.shape[3]))
    require(
        fits, name + " takes a beta and a decay per value head, or a decay per feature, not {} and {}", beta.shape, decay.shape
    )
    return _check_state(name, state, (value.shape[0], value.shape[2], key.shape[3], value.shape[3]))


def _check_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[int, ...]:
    """The sizes of the state. Raises RuntimeError unless the shapes of the operands fit."""
    name = "lissom::selective_scan"
    fits = x.dim() == b.dim() == 4 and step.shape == x.shape[:3]
    require(fits, name + " takes x [batch, tokens, heads, channels] and a step per head, not {} and {}", x.shape, step.shape)
    fits = b.shape == c.shape and b.shape[:2] == x.shape[:2] and b.shape[2] > 0 and x.shape[2] % b.shape[2] == 0
    require(fits, name + " takes b and c [batch, tokens, groups, states] for x {}, not {} and {}", x.shape, b.shape, c.shape)
    fits = a.shape == x.shape[2:3] or (a.shape == (x.shape[2], b.shape[3]) and x.shape[3] == 1 and b.shape[2] == 1)
    message = " takes one a per head, or one per state where heads have one channel and one group, not {} for x {}"
    require(fits, name + message, a.shape, x.shape)
    require(
        d is None or d.shape == x.shape[2:3],
        name + " takes one d per head, {}, not {}",
        x.shape[2],
        d.shape if d is not None else (),
    )
    return _check_state(name, state, (x.shape[0], x.shape[2], x.shape[3], b.shape[3]))


def _check_state(name: str, state: torch.Tensor | None, sizes: tuple[int, ...]) -> tuple[int, ...]:
    if state is not None:
        require(state.shape == sizes, name + " takes a state of {}, not {}", sizes, state.shape)
    return sizes


def _fake_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    scale: float,
    normalizes: bool,
) -> Pair:
    sizes = _check_delta_rule(query, key, value, decay, beta, state)
    return value.new_empty(value.shape), value.new_empty(sizes, dtype=_wide(value))


def _fake_scan(
    x: torch.Tensor,
    step: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
) -> Pair:
    sizes = _check_scan(x, step, a, b, c, d, state)
    return x.new_empty(x.shape), x.new_empty(sizes, dtype=_wide(x))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: object, keyword_only_inputs: dict[str, Any] | None = None) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs or {}


def _backward_of(reference: Any) -> Any:
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Recomputes the forward pass and differentiates it: the states of all tokens are not saved."""
        inputs = [None if saved is None else saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = reference(*inputs, **ctx.options)
        given = [operand for operand in inputs if operand is not None]
        computed = iter(torch.autograd.grad(outputs, given, gradients, allow_unused=True))
        return tuple(None if operand is None else next(computed) for operand in inputs)

    return backward


_RULE = (
    "batch !tokens {0} !states, batch tokens {0} states, batch tokens {1} channels, batch tokens heads [states], "
    "batch tokens heads [states], batch heads states channels"
    " -> batch tokens heads channels, batch heads states channels : 4 batch tokens heads channels states"
)
"""Each token multiplies the state by its decay, its key, the correction and its query. Heads of keys may be fewer."""
_SCAN = (
    "batch !tokens {1} channels, batch tokens heads, heads [!states], batch tokens {0} states, batch tokens {0} states, heads, "
    "batch heads channels states"
    " -> batch tokens heads channels, batch heads channels states : 3 batch tokens heads channels states"
)
"""Each token multiplies the state by its decay, b by x, and the state by c. Heads of b and c may be fewer."""

gated_delta_rule = define(
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, Tensor? state=None, *, float scale, "
    "bool normalizes) -> (Tensor, Tensor)",
    gated_delta_rule_reference,
    _fake_delta_rule,
    dimensions=Dimensions(f"{_RULE.format('heads', 'heads')} | {_RULE.format('!shared', '!heads')}"),
    backward=_backward_of(gated_delta_rule_reference),
    setup_context=_remember,
)
"""The operator. query, key: [batch, tokens, key_heads, key_dim]; value: [batch, tokens, heads, value_dim], heads a multiple of
key_heads; decay: natural logarithms, [batch, tokens, heads] or [batch, tokens, heads, key_dim]; beta: [batch, tokens, heads];
state: [batch, heads, key_dim, value_dim], zeros where it is not given; scale: of queries; normalizes: whether queries and keys
are divided by their lengths first. Returns values like `value`, and the state after the last token in float32 or wider.
Differentiable."""

selective_scan = define(
    "selective_scan(Tensor x, Tensor step, Tensor a, Tensor b, Tensor c, Tensor? d=None, Tensor? state=None) "
    "-> (Tensor, Tensor)",
    selective_scan_reference,
    _fake_scan,
    dimensions=Dimensions(f"{_SCAN.format('heads', 'heads')} | {_SCAN.format('!shared', '!heads')}"),
    backward=_backward_of(selective_scan_reference),
    setup_context=_remember,
)
"""The operator. x: [batch, tokens, heads, channels]; step: Δ, [batch, tokens, heads]; a: [heads], or [heads, states] where
heads have one channel (Mamba-1); b, c: [batch, tokens, groups, states], heads a multiple of groups; d: [heads]; state: [batch,
heads, channels, states], zeros where it is not given. Returns values like x, and the state after the last token in float32 or
wider. Differentiable."""
