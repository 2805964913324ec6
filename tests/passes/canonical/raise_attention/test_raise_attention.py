from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.errors import VerifyError
from lissom.ops import fused_attention, merged_attention
from lissom.passes.canonical.raise_attention.raise_attention import RaiseAttention
from tests.support import captures
from tests.support.harness import Calls, aten, calls, check_golden, every_backend, rewrite
from tests.support.models import normal, seeded

Function = Callable[..., object]

PASSES = "remove-no-ops,fold-constants,raise-attention"
BATCH, HEADS, LENGTH, KEYS, SIZE = 2, 3, 5, 7, 4
LOWEST = torch.finfo(torch.float32).min
INFINITE = -math.inf


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention over [batch, heads, tokens, head size] in float64, one query after the other."""
    q, k, v = (item.double() for item in (q, k, v))
    batch, heads, length = max(q.shape[0], k.shape[0]), max(q.shape[1], k.shape[1]), q.shape[2]
    q, k, v = (item.expand(batch, heads, -1, -1) for item in (q, k, v))
    bias = torch.zeros(length, k.shape[2]) if bias is None else bias
    bias = bias.double().expand(batch, heads, length, k.shape[2])
    found = torch.empty(batch, heads, length, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                scores = torch.einsum("d,sd->s", q[b, h, i], k[b, h]) * scale + bias[b, h, i]
                weights = torch.exp(scores - scores.max())
                found[b, h, i] = torch.einsum("s,sd->d", weights / weights.sum(), v[b, h])
    return found


def causal(value: float = LOWEST) -> torch.Tensor:
    """Each query sees its own key, those before it, and two more."""
    dtype = torch.float64 if value < LOWEST else torch.float32
    return torch.full((LENGTH, KEYS), value, dtype=dtype).triu(3)


def padding(rows: int = BATCH) -> torch.Tensor:
    """True for the last three keys of every second row."""
    mask = torch.zeros(rows, 1, 1, KEYS, dtype=torch.bool)
    mask[1::2, ..., 4:] = True
    return mask


@dataclass(frozen=True)
class Spelling:
    """A way to write attention out; the scale and the bias it amounts to; the buffers it reads."""

    function: Function
    scale: float = 1.0
    bias: torch.Tensor | None = None
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def biased(*biases: torch.Tensor) -> Spelling:
    def function(model: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        for bias in model.buffers():
            scores = scores + bias
        return scores.softmax(-1) @ v

    return Spelling(function, bias=sum(biases), buffers={f"bias_{i}": bias for i, bias in enumerate(biases)})


def filled(fill: float, *masks: torch.Tensor) -> Spelling:
    def function(model: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        for mask in model.buffers():
            scores = scores.masked_fill(mask, fill)
        return scores.softmax(-1) @ v

    bias = torch.zeros(BATCH, 1, LENGTH, KEYS, dtype=torch.float64)
    for mask in masks:
        bias = bias.masked_fill(mask, fill)
    return Spelling(function, bias=bias, buffers={f"mask_{i}": mask for i, mask in enumerate(masks)})


SPELLINGS: dict[str, Spelling] = {
    "plain": Spelling(plain),
    "scores multiplied": Spelling(lambda q, k, v: (0.5 * (q @ k.mT)).softmax(-1) @ v, 0.5),
    "scores divided": Spelling(lambda q, k, v: (q @ k.mT / math.sqrt(SIZE)).softmax(-1) @ v, 0.5),
    "q scaled": Spelling(lambda q, k, v: plain(q * 0.5, k, v), 0.5),
    "k scaled": Spelling(lambda q, k, v: plain(q, k / 2, v), 0.5),
    "transposed k scaled": Spelling(lambda q, k, v: (q @ (k.mT * 0.5)).softmax(-1) @ v, 0.5),
    "q and k scaled": Spelling(lambda q, k, v: (q * 0.5 @ (k.mT * 0.5) * 2).softmax(-1) @ v, 0.5),
    "scale of rank 0": Spelling(
        lambda model, q, k, v: (q @ k.mT / model.root).softmax(-1) @ v, 0.5, buffers={"root": torch.tensor(2.0)}
    ),
    "scale computed from a constant": Spelling(
        lambda q, k, v: (q @ k.mT / torch.sqrt(torch.tensor(q.shape[-1]))).softmax(-1) @ v, 0.5
    ),
    "keys permuted": Spelling(lambda q, k, v: (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v),
    "softmax over dimension 3": Spelling(lambda q, k, v: (q @ k.mT).softmax(3) @ v),
    "softmax in float64": Spelling(lambda q, k, v: torch.softmax(q @ k.mT, -1, dtype=torch.float64).to(q.dtype) @ v),
    "dropout": Spelling(lambda q, k, v: nn.functional.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v),
    "mask": biased(causal()),
    "mask before the sum": Spelling(
        lambda model, q, k, v: (model.mask + q @ k.mT).softmax(-1) @ v, bias=causal(), buffers={"mask": causal()}
    ),
    "mask before the scale": Spelling(
        lambda model, q, k, v: ((q @ k.mT + model.mask) * 0.5).softmax(-1) @ v, 0.5, 0.5 * causal(-9), {"mask": causal(-9)}
    ),
    "mask in float64": Spelling(
        lambda model, q, k, v: (q @ k.mT + model.mask).softmax(-1).to(q.dtype) @ v,
        bias=causal(torch.finfo(torch.float64).min),
        buffers={"mask": causal(torch.finfo(torch.float64).min)},
    ),
    "mask and position bias": biased(normal(1, HEADS, LENGTH, KEYS), causal()),
    "bias of whole numbers": biased(torch.arange(KEYS).expand(LENGTH, KEYS).contiguous()),
    "bias of a head": biased(normal(HEADS, LENGTH, KEYS)),
    "bias of a key": biased(normal(KEYS)),
    "filled with the lowest": filled(LOWEST, padding()),
    "filled with minus infinity": filled(INFINITE, padding()),
    "filled twice": filled(LOWEST, padding(), causal().bool()),
    "filled until a query sees nothing": filled(LOWEST, padding(), (torch.arange(LENGTH) == 2)[:, None].repeat(1, KEYS)),
    "fill, then scale": Spelling(
        lambda model, q, k, v: ((q @ k.mT).masked_fill(model.mask, LOWEST) / 2).softmax(-1) @ v,
        0.5,
        torch.zeros(BATCH, 1, 1, KEYS).masked_fill(padding(), LOWEST),
        {"mask": padding()},
    ),
    "bias subtracted": Spelling(
        lambda model, q, k, v: ((q @ k.mT - 2.0 * model.bias) / 2).softmax(-1) @ v, 0.5, -causal(9.0), {"bias": causal(9.0)}
    ),
    "chosen with where": Spelling(
        lambda model, q, k, v: torch.where(model.seen, q @ k.mT, torch.tensor(LOWEST)).softmax(-1) @ v,
        bias=causal(),
        buffers={"seen": causal() == 0},
    ),
    "hidden with where": Spelling(
        lambda model, q, k, v: torch.where(model.hidden, -1e9, q @ k.mT).softmax(-1) @ v,
        bias=causal(),
        buffers={"hidden": causal() != 0},
    ),
    "kept above the lowest": Spelling(
        lambda model, q, k, v: torch.max(q @ k.mT + model.mask + model.mask, torch.tensor(LOWEST)).softmax(-1) @ v,
        bias=2 * causal(LOWEST).double(),
        buffers={"mask": causal()},
    ),
    "shifted by the maximum": Spelling(
        lambda q, k, v: ((q @ k.mT / 4 - (q @ k.mT / 4).amax(-1, keepdim=True)) * 2).softmax(-1) @ v, 0.5
    ),
    "weights put to 0 where hidden": Spelling(
        lambda model, q, k, v: (q @ k.mT).masked_fill(model.mask, INFINITE).softmax(-1).masked_fill(model.mask, 0.0) @ v,
        bias=torch.zeros(BATCH, 1, 1, KEYS).masked_fill(padding(), INFINITE),
        buffers={"mask": padding()},
    ),
    "a temperature a head": Spelling(
        lambda model, q, k, v: ((q @ k.mT) * model.t + model.mask).softmax(-1) @ v,
        0.5,
        causal(),
        {"t": torch.full((HEADS, 1, 1), 0.5), "mask": causal()},
    ),
    "windows beside the batch": Spelling(
        lambda model, q, k, v: ((q @ k.mT).unflatten(0, (1, BATCH)) + model.mask[None, :, None]).flatten(0, 1).softmax(-1) @ v,
        bias=torch.stack([causal(), torch.zeros(LENGTH, KEYS)])[:, None],
        buffers={"mask": torch.stack([causal(), torch.zeros(LENGTH, KEYS)])},
    ),
    "weights put to 0 where low": Spelling(
        lambda model, q, k, v: (q @ k.mT).masked_fill(model.mask, LOWEST).softmax(-1).masked_fill(model.mask, 0.0) @ v,
        bias=torch.zeros(BATCH, 1, 1, KEYS).masked_fill(padding(), INFINITE),
        buffers={"mask": padding()},
    ),
    "batch and heads folded in the scores alone": Spelling(
        lambda q, k, v: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).view(BATCH, HEADS, LENGTH, KEYS).softmax(-1) @ v
    ),
    "one head of keys for all": Spelling(lambda q, k, v: plain(q, k[:, :1], v[:, :1])),
}


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v; a value is wider than a key."""
    shapes = ((LENGTH, SIZE), (KEYS, SIZE), (KEYS, SIZE + 2))
    q, k, v = (normal(BATCH, HEADS, *shape, seed=seed) for seed, shape in enumerate(shapes, 3))
    return q, k, v


def raised(program: Program) -> int:
    return calls(program, aten.scaled_dot_product_attention.default)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_numbers(spelling: Spelling) -> None:
    q, k, v = tensors()
    program, history = rewrite(PASSES, Calls(spelling.function, **spelling.buffers), q, k, v)
    assert (raised(program), calls(program, aten.softmax.int)) == (1, 0)
    assert not history.steps[-1].skipped
    k, v = (k[:, :1], v[:, :1]) if spelling is SPELLINGS["one head of keys for all"] else (k, v)
    # Sums of seven float32 terms and an exponential: some ten roundings of 6e-8 on values of order 1.
    torch.testing.assert_close(
        program(*tensors()).double(), attention(q, k, v, spelling.scale, spelling.bias), rtol=0, atol=2e-6
    )


def capped(scores: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(scores / cap) * cap


def with_sinks(scores: torch.Tensor, sinks: torch.Tensor, shift: bool = False) -> torch.Tensor:
    joined = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)], -1)
    joined = joined - joined.max(-1, keepdim=True).values if shift else joined
    return joined.softmax(-1)[..., :-1]


CAPS_AND_SINKS: dict[str, Function] = {
    "soft cap": lambda model, q, k, v: capped(q @ k.mT * 0.5, 3.0).softmax(-1) @ v,
    "soft cap of 1": lambda model, q, k, v: torch.tanh(0.5 * q @ k.mT).softmax(-1) @ v,
    "soft cap, then scale": lambda model, q, k, v: (capped(q @ k.mT, 3.0) * -0.5).softmax(-1) @ v,
    "soft cap, then mask": lambda model, q, k, v: (capped(q @ k.mT, 3.0) + model.mask).softmax(-1) @ v,
    "sinks": lambda model, q, k, v: with_sinks(q @ k.mT * 0.5, model.sinks) @ v,
    "sinks, mask and shift": lambda model, q, k, v: with_sinks(q @ k.mT * 0.5 + model.mask, model.sinks, True) @ v,
    "sinks and soft cap": lambda model, q, k, v: with_sinks(capped(q @ k.mT, 3.0), model.sinks) @ v,
}


@pytest.mark.parametrize("function", CAPS_AND_SINKS.values(), ids=CAPS_AND_SINKS)
def test_soft_caps_and_sinks(function: Function) -> None:
    module = Calls(function, mask=causal(), sinks=nn.Parameter(normal(HEADS)))
    wanted = module.double()(*(item.double() for item in tensors()))
    program, _ = rewrite(PASSES, module.float(), *tensors())
    assert (calls(program, torch.ops.lissom.attention.default), calls(program, aten.softmax.int)) == (1, 0)
    # As in test_numbers.
    torch.testing.assert_close(program(*tensors()).double(), wanted, rtol=0, atol=2e-6)


def test_a_fill_of_half_precision() -> None:
    def function(model: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(model.mask, -65504).softmax(-1) @ v

    q, k, v = (item.half() for item in tensors())
    program, _ = rewrite(PASSES, Calls(function, mask=padding()), q, k, v)
    assert (raised(program), calls(program, aten.softmax.int)) == (1, 0)
    bias = torch.zeros(BATCH, 1, 1, KEYS).masked_fill(padding(), LOWEST)
    # Values of order 1 round once to 11 bits (2^-11 = 5e-4), and so may the scores and weights inside.
    torch.testing.assert_close(program(q, k, v).double(), attention(q, k, v, 1.0, bias), rtol=0, atol=2e-3)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softmax_in_float32_inside_a_bfloat16_model(mask_dtype: torch.dtype) -> None:
    def function(model: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT * 0.5 + model.mask
        return scores.float().softmax(-1).type_as(q) @ v

    mask = causal(torch.finfo(mask_dtype).min).to(mask_dtype)
    # A query that sees nothing gives every key the same weight; a mask that turned infinite would give NaN.
    mask[0] = torch.finfo(mask_dtype).min
    q, k, v = (item.bfloat16() for item in tensors())
    program, _ = rewrite(PASSES, Calls(function, mask=mask), q, k, v)
    assert (raised(program), calls(program, aten.softmax.int)) == (1, 0)
    # Values of order 1 round once to 8 bits (2^-8 = 4e-3), and so may the weights inside.
    torch.testing.assert_close(program(q, k, v).double(), attention(q, k, v, 0.5, mask), rtol=0, atol=1e-2)


def test_latent_queries_serve_every_row() -> None:
    q, k, v = tensors()
    module = Calls(lambda model, k, v: plain(model.q, k, v), q=nn.Parameter(q[:1]))
    program, _ = rewrite(PASSES, module, k, v)
    assert raised(program) == 1
    # As in test_numbers.
    torch.testing.assert_close(program(k, v).double(), attention(q[:1], k, v), rtol=0, atol=2e-6)


def test_a_bias_cut_to_whole_numbers_keeps_the_cut() -> None:
    def function(model: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT + model.bias.to(torch.int64)).softmax(-1) @ v

    bias = 3 * normal(LENGTH, KEYS)
    program, _ = rewrite(RaiseAttention(), Calls(function, bias=bias), *tensors())
    assert raised(program) == 1
    # As in test_numbers.
    torch.testing.assert_close(program(*tensors()).double(), attention(*tensors(), bias=bias.trunc()), rtol=0, atol=2e-6)


@pytest.mark.xfail(
    strict=True,
    raises=VerifyError,
    reason="a query that sees nothing under -inf is NaN in the model and zero in attention; no pass can tell from the graph",
)
def test_a_query_that_sees_nothing_under_minus_infinity() -> None:
    q, k, v = tensors()
    spelling = filled(INFINITE, torch.ones(LENGTH, 1, dtype=torch.bool).tril())
    rewrite(PASSES, Calls(spelling.function, **spelling.buffers), q, k, v)


SCALES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "scores": lambda q, k, scale: q @ k.transpose(2, 3) * scale,
    "division": lambda q, k, scale: q @ k.transpose(2, 3) / (1 / scale),
    "q": lambda q, k, scale: (q * scale) @ k.transpose(2, 3),
    "k": lambda q, k, scale: q @ (k.transpose(2, 3) * scale),
    "both": lambda q, k, scale: (q * scale**0.5) @ (k * scale**0.5).transpose(2, 3),
}
MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "none": lambda scores, seen: scores,
    "added": lambda scores, seen: scores + (1.0 - seen[:, None, None, :].to(scores.dtype)) * LOWEST,
    "filled": lambda scores, seen: scores.masked_fill(seen[:, None, None, :] == 0, LOWEST),
    "causal and filled": lambda scores, seen: MASKS["filled"](scores + torch.full(scores.shape[-2:], LOWEST).triu(1), seen),
}


class SelfAttention(nn.Module):
    """Self-attention over [batch, tokens, width] with an attention mask of ones and zeros."""

    def __init__(self, heads: int = 2, size: int = 4, scale: str = "scores", mask: str = "added") -> None:
        super().__init__()
        self.heads, self.size, self.scale, self.mask = heads, size, scale, mask
        self.qkv = nn.Linear(heads * size, 3 * heads * size)

    def split(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [part.unflatten(-1, (self.heads, self.size)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        scores = MASKS[self.mask](SCALES[self.scale](q, k, self.size**-0.5), seen)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def oracle(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        length = x.shape[1]
        bias = torch.zeros(len(x), 1, length, length, dtype=torch.float64)
        if "causal" in self.mask:
            bias += torch.full((length, length), LOWEST, dtype=torch.float64).triu(1)
        if self.mask != "none":
            bias = bias.masked_fill(seen[:, None, None, :] == 0, LOWEST)
        return attention(q, k, v, self.size**-0.5, bias).transpose(1, 2).flatten(2)


def mask_of(batch: int, length: int) -> torch.Tensor:
    """All ones, but for the last token of the last row where there are two or more."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, max(1, length - 1) :] = 0
    return mask


def test_rewrites() -> None:
    module = seeded(SelfAttention)
    _, history = rewrite("remove-no-ops,raise-attention", module, normal(2, 5, 8), mask_of(2, 5))
    check_golden("raise_attention", history.diff(1, 2))


def test_leaves_other_graphs_alone() -> None:
    module = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True))
    program, history = rewrite(RaiseAttention(), module, normal(2, 5, 8))
    assert raised(program) == 1
    assert program.text() == history.texts[0]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    heads=st.integers(1, 4),
    size=st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 3, 5, 8, 13]),
    scale=st.sampled_from(sorted(SCALES)),
    mask=st.sampled_from(sorted(MASKS)),
)
def test_any_size_and_spelling(heads: int, size: int, batch: int, length: int, scale: str, mask: str) -> None:
    module = seeded(lambda: SelfAttention(heads, size, scale, mask))
    program, _ = rewrite("remove-no-ops,raise-attention", module, normal(batch, length, heads * size), mask_of(batch, length))
    assert (raised(program), calls(program, aten.softmax.int)) == (1, 0)
    x, seen = normal(3, 7, heads * size, seed=1), mask_of(3, 7)
    with torch.no_grad():
        # As in test_numbers; the projections add sums of up to 36 terms.
        torch.testing.assert_close(program(x, seen).double(), module.oracle(x, seen), rtol=0, atol=5e-6)


@every_backend
def test_composes(backend: Backend) -> None:
    fast = captures.compile(module := seeded(SelfAttention), (normal(2, 5, 8), mask_of(2, 5)), backend=backend)
    fused = calls(fast.program, fused_attention, merged_attention)
    assert (raised(fast.program) + fused, calls(fast.program, aten.softmax.int)) == (1, 0)
    x, seen = normal(3, 7, 8, seed=1), mask_of(3, 7)
    # As in test_any_size_and_spelling.
    torch.testing.assert_close(fast(x, seen).double(), module.oracle(x, seen), rtol=0, atol=5e-6)
