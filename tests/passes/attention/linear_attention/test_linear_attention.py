"""Tests of linear-attention, with weights written out row by row in float64 as the oracle."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional

from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import RequirementError
from lissom.ops.linear_attention import linear_attention
from lissom.passes.attention.linear_attention.linear_attention import LinearAttention, chunk_for
from tests.support import captures
from tests.support.calibrated import passed
from tests.support.harness import calls, check_golden, every_backend_but_eager_slow, rewrite, simulates
from tests.support.models import CASES, Counter, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.support.neighbours import all_but_slow
from tests.support.written_attention import optimized

aten = torch.ops.aten
FEATURES = ("elu", "relu", "hedgehog")


class Attention(nn.Module):
    """Self-attention whose input is its queries; it may be causal, hide padding, and share key heads."""

    def __init__(self, causal: bool = False, key_heads: int = 4, scale: float = 0.7) -> None:
        super().__init__()
        self.causal, self.key_heads, self.scale = causal, key_heads, scale

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = q[:, : self.key_heads] * 0.5, q[:, : self.key_heads] - 1
        seen = None if mask is None else mask[:, None, None, :] != 0
        if seen is not None and self.causal:
            places = torch.arange(x.shape[1])
            seen = seen & (places[None, :] <= places[:, None])
        plain = self.causal and seen is None
        mixed = functional.scaled_dot_product_attention(
            q, k, v, seen, is_causal=plain, scale=self.scale, enable_gqa=self.key_heads != 4
        )
        return mixed.transpose(1, 2).flatten(2)


MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])


def features_of(name: str, x: torch.Tensor, scale: float) -> torch.Tensor:
    """φ without data, as the table of the pass has it."""
    if name == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    if name == "relu":
        return x * (x > 0)
    return torch.cat([(x * scale**0.5).exp(), (-x * scale**0.5).exp()], -1)


def by_hand(name: str, module: Attention, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Row by row in float64: features, weights, weighted mean."""
    q = x.double().unflatten(-1, (4, -1))
    result = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for token in range(q.shape[1]):
            for head in range(4):
                group = head * module.key_heads // 4
                total, weights = torch.zeros(q.shape[-1], dtype=torch.float64), 0.0
                for other in range(token + 1 if module.causal else q.shape[1]):
                    if mask is not None and not mask[row, other]:
                        continue
                    key = q[row, other, group]
                    sides = (features_of(name, side, module.scale) for side in (q[row, token, head], key * 0.5))
                    weight = float(torch.dot(*sides))
                    total, weights = total + weight * (key - 1), weights + weight
                result[row, token, head] = total / weights if weights else 0
    return result.flatten(2)


@cache
def last(passes: str, name: str) -> tuple[Program, Step]:
    """A tiny model after passes that are given padded batches as data; to be read only."""
    program, history = passed({"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}[name], passes)
    return program, history.steps[-1]


def test_rewrites() -> None:
    _, history = rewrite(LinearAttention(), seeded(lambda: Attention(True, 2)), normal(3, 7, 16), MASK)
    check_golden("linear_attention", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(LinearAttention(), seeded(FeedForward), normal(2, 5, 8))
    assert history.diff(0, 1) == "" and history.steps[1].summary == "nothing to do"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("key_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_numbers(name: str, causal: bool, key_heads: int, padded: bool) -> None:
    module = Attention(causal, key_heads)
    masks = (MASK,) if padded else ()
    program, _ = rewrite(LinearAttention(name), module, normal(3, 7, 16), *masks)  # pyright: ignore[reportArgumentType]
    x = normal(3, 7, 16, seed=1)
    found = program(x, *masks)
    assert isinstance(found, torch.Tensor)
    # Float32 against float64: exponentials of numbers up to 3, and sums of seven terms.
    assert relative_error(by_hand(name, module, x, *masks or (None,)).float(), found) < 1e-5


def test_padding_changes_nothing() -> None:
    program, _ = rewrite(LinearAttention(), Attention(), normal(3, 7, 16), MASK)
    x = normal(3, 7, 16)
    other = torch.where(MASK[..., None] != 0, x, 1e3)
    real = MASK != 0
    left, right = program(x, MASK), program(other, MASK)
    assert isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)
    assert torch.equal(left[real], right[real])


@pytest.mark.parametrize("name", FEATURES)
def test_large_numbers_stay_finite(name: str) -> None:
    program, _ = rewrite(LinearAttention(name), Attention(True), normal(2, 7, 16))  # pyright: ignore[reportArgumentType]
    for size in (1e-6, 1e3, 1e6):
        found = program(normal(2, 7, 16) * size)
        assert isinstance(found, torch.Tensor) and bool(found.isfinite().all())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_the_fit_comes_near_softmax(name: str) -> None:
    """Random tiny models attend nearly evenly, which the fitted maps follow."""
    _, step = last("linear-attention", name)
    assert step.summary == "rewrote 2" and step.relative_error is not None and step.relative_error < 5e-3
    assert step.notes[0].startswith("agreement with softmax (mass on the same keys, divergence in nats): ")
    assert step.notes[0].count("100%") == 2


def test_the_fit_is_the_same_twice() -> None:
    (first, _), (second, _) = last("linear-attention", "llama"), last.__wrapped__("linear-attention", "llama")
    for name, weight in first.weights().items():
        assert torch.equal(weight, second.weight(name))


def test_without_data_it_says_so() -> None:
    for name, said in (("elu", "scales are 1"), ("hedgehog", "projections are the identity")):
        _, history = rewrite(LinearAttention(name), Attention(), normal(2, 7, 16))  # pyright: ignore[reportArgumentType]
        assert history.steps[-1].notes == (f"there is no calibration data, so {said}; pass data= to fit them to softmax",)


def test_grouped_keys_are_not_repeated() -> None:
    program, _ = last("linear-attention", "llama")
    assert calls(program, aten.expand.default) == 0 and calls(program, aten.scaled_dot_product_attention.default) == 0
    (first, _) = program.nodes(linear_attention)
    assert first.kwargs == {"causal": True, "chunk": 64}
    assert program.weight("model.layers.0.self_attn.key_features.weight").shape == (2, 4, 4)


def test_the_mask_is_not_made_any_more() -> None:
    """What is left of it is the caller's mask: nothing of tokens × tokens is computed."""
    for name in ("bert", "gpt2", "llama"):
        program, _ = last("linear-attention", name)
        assert "sequence, sequence" not in program.text()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t5", "a bias is added to its scores"),
        pytest.param("deberta", "a bias is added to its scores", marks=pytest.mark.slow),
        pytest.param("gemma3", "its mask hides more than padding and later tokens", marks=pytest.mark.slow),
    ],
)
def test_other_attention_is_left_with_a_reason(name: str, reason: str) -> None:
    program = optimized(name).program
    _, history = Pipeline([LinearAttention()], checks="off").run(program)
    assert reason in history.steps[-1].summary


class Scored(nn.Module):
    """Attention that is more than products of queries and keys."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options
        self.sinks = nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        sinks = self.sinks if self.options.get("sinks") else None
        return torch.ops.lissom.attention(q, q, q, scale=1.0, softcap=self.options.get("softcap", 0.0), sinks=sinks)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"softcap": 5.0}, "its scores are soft-capped"), ({"sinks": True}, "it has sinks beside its keys")],
)
def test_capped_scores_and_sinks_are_left(options: dict[str, object], reason: str) -> None:
    _, history = rewrite(LinearAttention(), seeded(lambda: Scored(**options)), normal(2, 5, 16))
    assert history.steps[-1].summary == f"rewrote 0 of 1; skipped 1: {reason}"


def test_masks_of_other_inputs_are_left() -> None:
    """A mask that is causal for the probes may be anything for the caller."""

    class Positions(nn.Module):
        def forward(self, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
            q = x[:, None]
            return functional.scaled_dot_product_attention(q, q, q, (place[:, None, :] <= place[:, :, None])[:, None])

    places = torch.arange(5).repeat(2, 1)
    _, history = rewrite(LinearAttention(), Positions(), normal(2, 5, 16), places)
    assert history.steps[-1].summary == "rewrote 0 of 1; skipped 1: its mask hides more than padding and later tokens"


def test_patterns_choose_layers() -> None:
    _, step = last('linear-attention{features=elu,only="encoder.layer.1"}', "bert")
    assert step.summary == "rewrote 1 of 2; skipped 1: only= does not name it"
    _, step = last('linear-attention{features=elu,skip="encoder.layer.1"}', "bert")
    assert step.summary == "rewrote 1 of 2; skipped 1: skip= names it"


def test_requirements() -> None:
    with pytest.raises(RequirementError) as caught:
        rewrite(LinearAttention(), seeded(Counter), normal(3, 4))
    assert str(caught.value).startswith("linear-attention requires that a program keeps no state, such as a cache of keys")
    assert str(caught.value).endswith("capture the model without a cache, with use_cache=False")


@pytest.mark.parametrize("name", FEATURES)
def test_it_trains(name: str) -> None:
    """Every weight that had a gradient has one, and the maps' own do."""
    program, _ = last.__wrapped__(f"linear-attention{{features={name}}}", "gpt2")
    program, ids = program.own_copy(), tokens()
    found = program(input_ids=ids, attention_mask=torch.ones_like(ids))[0]  # pyright: ignore[reportIndexIssue]
    found.square().sum().backward()
    trained = {name: weight for name, weight in program.weights().items() if weight.requires_grad}
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in trained.values())
    if name != "relu":
        assert sum("_features." in item for item in trained) == {"elu": 4, "hedgehog": 8}[name]


@every_backend_but_eager_slow
@pytest.mark.parametrize("name", all_but_slow(["bert", "gpt2", "llama"], "llama"))
def test_composes(name: str, backend: Backend) -> None:
    case = CASES[name]()
    passes = "prune-heads{keep=0.5},eliminate-dead,linear-attention{features=elu},quantize"
    found = captures.compile(case.model, case.inputs, passes=passes, backend=backend, goal=None, simulate=simulates(backend))
    ids, mask = tokens(3, 11, seed=4), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    wanted = found.program(input_ids=ids, attention_mask=mask)[0]  # pyright: ignore[reportIndexIssue]
    # Float32 in another order; bytes are the same on both sides.
    assert relative_error(wanted, found(input_ids=ids, attention_mask=mask)[0]) < 1e-4  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_computes_beside_bfloat16(name: str) -> None:
    _, step = last("linear-attention,cast", name)
    assert step.relative_error is not None and step.relative_error < 0.05


def test_chunks_follow_the_features() -> None:
    assert [chunk_for(features) for features in (1, 64, 65, 128, 512)] == [64, 64, 128, 128, 256]
