"""Tests of pack-tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.backends.base import Backend
from lissom.compiler.ir import node as nodes
from lissom.ops import rotary
from lissom.passes.prune.pack_tokens.pack_tokens import PackTokens
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, every_backend, rewrite
from tests.support.models import Case, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.support.neighbours import all_but_slow

MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}
# Full, padded behind, padded in front, with a hole, and without any token.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()


class Encoder(nn.Module):
    """Two layers over [batch, tokens, 8] with a padding mask; `answer` makes of tokens and mask what is returned."""

    def __init__(self, answer: str = "mean", layers: int = 2) -> None:
        super().__init__()
        self.answer = answer
        self.q, self.k, self.v, self.o = (nn.ModuleList(nn.Linear(8, 8) for _ in range(layers)) for _ in range(4))
        self.feed_forward = nn.ModuleList(FeedForward() for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        for q, k, v, o, feed_forward in zip(self.q, self.k, self.v, self.o, self.feed_forward, strict=True):
            heads = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (q, k, v)]
            mixed = functional.scaled_dot_product_attention(*heads, attn_mask=self.seen(mask))
            x = feed_forward(x + o(mixed.transpose(1, 2).flatten(2)))
        return _ANSWERS[self.answer](x, mask)

    def seen(self, mask: torch.Tensor) -> torch.Tensor:
        return mask[:, None, None, :]


class Rotated(Encoder):
    """The same with rotary embeddings; `counted`: positions count real tokens, so that each text has angles of its own."""

    def __init__(self, counted: bool) -> None:
        super().__init__()
        self.counted = counted

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = mask.cumsum(1) if self.counted else torch.arange(mask.shape[1])[None]
        angles = places[:, None, :, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        for q, k, v, o in zip(self.q, self.k, self.v, self.o, strict=True):
            heads = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (q, k, v)]
            turned = (rotary(item, angles.cos(), angles.sin()) for item in heads[:2])
            mixed = functional.scaled_dot_product_attention(*turned, heads[2], attn_mask=self.seen(mask))
            x = x + o(mixed.transpose(1, 2).flatten(2))
        return _ANSWERS[self.answer](x, mask)


_ANSWERS = {
    "mean": lambda x, mask: (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1),
    "zeroed": lambda x, mask: torch.where(mask[..., None], x, 0.0),
    "first": lambda x, mask: x[:, 0],
    "last": lambda x, mask: x[:, -1],
    "computed": lambda x, mask: x[torch.arange(x.shape[0]), mask.sum(1) - 1],
    "heads": lambda x, mask: x.unflatten(-1, (2, 4)).transpose(1, 2)[:, :, 0],
    "permuted": lambda x, mask: x.unflatten(-1, (2, 4)).permute(0, 2, 1, 3).sigmoid()[:, :, -1],
    "features": lambda x, mask: x.transpose(1, 2).sigmoid()[:, :, 0],
    "features and back": lambda x, mask: x.transpose(1, 2).sigmoid().transpose(1, 2)[:, 0],
    "plain": lambda x, mask: x,
    "plain mean": lambda x, mask: x.mean(1),
}


def inputs(batch: int = 5, length: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    mask = MASK[torch.arange(batch) % 5][:, torch.arange(length) % 5]
    return normal(batch, length, 8, seed=seed), mask


def packed_rows(program: object) -> set[str]:
    """The kinds of calls that run on [1, real tokens, ...]."""
    found = (node for node in program.nodes() if nodes.is_tensor(node) and nodes.tensor_type(node).rank == 3)
    return {str(node.target) for node in found if str(nodes.tensor_type(node).shape[1]).startswith("u")}


def test_rewrites() -> None:
    _, history = rewrite(PackTokens(), seeded(lambda: Encoder(layers=1)), *inputs())
    check_golden("pack_tokens", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(PackTokens(), seeded(FeedForward), normal(2, 5, 8))
    assert history.diff(0, 1) == ""
    assert history.steps[1].summary == "nothing to do"


@pytest.mark.parametrize("answer", [name for name in _ANSWERS if not name.startswith("plain")])
def test_numbers(answer: str) -> None:
    module = seeded(lambda: Encoder(answer))
    program, history = rewrite(PackTokens(), module, *inputs())
    assert calls(program, aten.nonzero.default) == 1
    assert {"aten.linear.default", "aten.layer_norm.default", "aten.gelu.default", "aten.add.Tensor"} <= packed_rows(program)
    for batch, length in ((5, 5), (1, 1), (7, 9), (3, 2)):
        x, mask = inputs(batch, length, seed=1)
        wanted = copy.deepcopy(module).double()(x.double(), mask)
        # Two layers of sums of eight float32 products of order 1.
        torch.testing.assert_close(program(x, mask).double(), wanted, rtol=0, atol=2e-6)
    assert history.steps[1].relative_error is not None


@pytest.mark.parametrize("counted", [False, True])
def test_heads_are_turned_without_padding(counted: bool) -> None:
    module = seeded(lambda: Rotated(counted))
    program, _ = rewrite(PackTokens(), module, *inputs())
    turned = [nodes.tensor_type(node).shape for node in program.nodes(rotary)]
    assert len(turned) == 4
    assert all(shape[0] == 1 and str(shape[2]).startswith("u") for shape in turned)
    for batch, length in ((5, 5), (1, 1), (7, 9)):
        x, mask = inputs(batch, length, seed=1)
        # Two layers of sums of eight float32 products of order 1.
        torch.testing.assert_close(program(x, mask), module(x, mask), rtol=0, atol=2e-6)


@pytest.mark.parametrize("fill", [-1e4, float("-inf")])
@pytest.mark.parametrize("answer", ["first", "last"])
def test_padding_that_is_chosen_may_see_padding(answer: str, fill: float) -> None:
    """Found by tools/fuzz: a query that causality keeps from every real token attends to padding, all the same."""

    class Causal(Encoder):
        def seen(self, mask: torch.Tensor) -> torch.Tensor:
            shown = mask[:, None, None, :] & torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
            return torch.zeros(shown.shape).masked_fill(~shown, fill)

    module = seeded(lambda: Causal(answer))
    program, _ = rewrite(PackTokens(), module, *inputs())
    assert calls(program, aten.nonzero.default) == 1
    x, mask = inputs(4, 5, seed=1)
    # Scores that -1e4 is added to are rounded to a thousandth.
    torch.testing.assert_close(program(x, mask), module(x, mask), rtol=0, atol=1e-3)


def test_a_row_without_padding_gives_the_same() -> None:
    module = seeded(lambda: Encoder("zeroed"))
    program, _ = rewrite(PackTokens(), module, *inputs())
    x, mask = inputs()
    together = program(x, mask)
    # Each sentence by itself, without its padding.
    for row, real in enumerate(mask[:4]):
        alone = module(x[row : row + 1, real], torch.ones(1, int(real.sum()), dtype=torch.bool))
        # Positions play no part in this model.
        torch.testing.assert_close(together[row][real], alone[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("plain", "it is an output, at padding positions too; put zero-padding in front if nobody reads these"),
        ("plain mean", "it reads positions that may be padding"),
    ],
)
def test_padding_that_is_read_is_a_reason_to_stop(answer: str, reason: str) -> None:
    _, history = rewrite(PackTokens(), seeded(lambda: Encoder(answer)), *inputs())
    assert history.diff(0, 1) == ""
    assert history.steps[1].summary == f"rewrote 0 of 1; skipped 1: {reason}"


def test_second_attention_that_sees_padding_is_reason_to_stop() -> None:
    class Careless(Encoder):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            seen = super().forward(x, mask)
            return torch.where(mask[..., None], functional.scaled_dot_product_attention(seen, seen, seen), 0.0)

    _, history = rewrite(PackTokens(), seeded(lambda: Careless("plain")), *inputs())
    assert history.steps[1].summary == "rewrote 0 of 1; skipped 1: its mask does not hide padding"


@pytest.mark.parametrize("name", all_but_slow(MODELS, "tiny_bert"))
def test_transformers_compose_with_zero_padding_and_cast(name: str) -> None:
    case: Case = MODELS[name]()
    fitting = {**case.kwargs, "attention_mask": torch.ones_like(case.kwargs["input_ids"])}
    fitting["attention_mask"][1, 3:] = 0
    optimized = captures.optimize(case.model, fitting, passes="zero-padding,pack-tokens,cast")
    steps = {step.spelling: step for step in optimized.report.history.steps}
    assert calls(optimized.program, aten.nonzero.default) == 1
    assert steps["pack-tokens"].rewritten > 10
    # Of bfloat16 alone: zeros at padding are what it is measured against.
    assert steps["cast"].relative_error is not None and steps["cast"].relative_error < 0.1


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-group", "int8-weight"])
def test_quantized_layers_are_packed(scheme: str) -> None:
    """Each row has scales of its own, so packed and padded layers round alike."""
    case = tiny_bert()
    fitting = {**case.kwargs, "attention_mask": torch.ones_like(case.kwargs["input_ids"])}
    fitting["attention_mask"][1, 3:] = 0
    passes = f"quantize{{scheme={scheme}}},zero-padding"
    padded, packed = (
        captures.compile(case.model, fitting, passes=more, goal=None) for more in (passes, f"{passes},pack-tokens")
    )
    assert calls(packed.program, aten.nonzero.default) == 1
    for left, right in zip(*(model(**fitting).to_tuple() for model in (packed, padded)), strict=True):
        # Of products of order 1 with other sums; a rounded activation may change by one step of 1/127.
        torch.testing.assert_close(left, right, rtol=0, atol=0.02)


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(lambda: Encoder("zeroed"))
    fast = captures.compile(module, inputs(), passes="pack-tokens", backend=backend)
    x, mask = inputs(6, 9, seed=2)
    # Sums of eight float32 products of order 1, in another order.
    torch.testing.assert_close(fast(x, mask), module(x, mask), rtol=0, atol=5e-6)
