"""Tests of lissom.frontends.capture.cache_lengths: KV caches among a model's arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.frontends.capture.export import capture
from tests.frontends.capture.test_dynamic import refusal
from tests.support.models import normal, seeded

Past = list[tuple[torch.Tensor, torch.Tensor]]


class Cached(nn.Module):
    """A decoder that takes its KV cache as an argument, `[(k, v), ...]`, with a mask over cached and new tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, ids: torch.Tensor, past: Past, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, Past]:
        x, new = self.embedding(ids), []
        rows, tokens, _ = x.shape
        for qkv, (old_k, old_v) in zip(self.qkv, past, strict=True):
            q, k, v = (item.view(rows, tokens, 2, 8).transpose(1, 2) for item in qkv(x).chunk(3, -1))
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
            seen = torch.ones(tokens, k.shape[2], dtype=torch.bool).tril(k.shape[2] - tokens)
            if mask is not None:
                seen = mask if mask.dim() == 4 else seen & mask.bool()[:, None, None]
            found = nn.functional.scaled_dot_product_attention(q, k, v, seen)
            x = x + self.out(found.transpose(1, 2).reshape(rows, tokens, 16))
            new.append((k, v))
        return x, new


def cached_call(rows: int, tokens: int, cached: int, rank: int) -> tuple[object, ...]:
    """ids and past; a mask [rows, cached + tokens] or [rows, 1, tokens, cached + tokens] too for a rank of 2 or 4."""
    ids = torch.randint(0, 50, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    past = [tuple(normal(rows, 2, cached, 8, seed=10 * layer + index) for index in range(2)) for layer in range(2)]
    if not rank:
        return ids, past
    seen = torch.ones(rows, cached + tokens, dtype=torch.bool)
    seen[-1, 0] = False
    causal = torch.ones(tokens, cached + tokens, dtype=torch.bool).tril(cached)
    return ids, past, seen.long() if rank == 2 else (causal & seen[:, None])[:, None]


@pytest.mark.parametrize(("tokens", "cached", "rank"), [(3, 5, 0), (3, 5, 2), (3, 5, 4), (1, 5, 2), (3, 3, 2), (2, 2, 2)])
def test_a_cache_among_the_arguments_may_have_any_length(tokens, cached, rank):
    model = seeded(Cached).eval()
    found = capture(model, cached_call(2, tokens, cached, rank))
    assert {item.name for item in found.program.signature.dimensions.values()} >= {"batch", "sequence"}
    assert len(found.program.signature.dimensions) == 3
    for rows, more, length in ((3, 4, 2), (1, 1, 7)):
        call = cached_call(rows, more, length, rank)
        with torch.no_grad():
            (wanted, new), (got, kept) = model(*call), found.program(*call)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)  # float32 products in another order
        assert kept[0][0].shape == new[0][0].shape


@pytest.mark.parametrize("name", ["past", "past[0]", "past[0][0]"])
def test_a_part_of_an_argument_may_be_named(name):
    dynamic = {"past": {2: "cached"}, name: {2: "cached"}, "mask": {1: "total"}}
    program = capture(seeded(Cached).eval(), cached_call(2, 3, 5, 2), dynamic=dynamic).program
    assert "cached" in {item.name for item in program.signature.dimensions.values()}
    call = cached_call(2, 3, 9, 2)
    with torch.no_grad():
        torch.testing.assert_close(program(*call)[0], seeded(Cached).eval()(*call)[0], rtol=1e-5, atol=1e-6)


def test_an_unknown_part_is_refused_with_those_there_are():
    found = refusal(lambda: capture(seeded(Cached).eval(), cached_call(2, 3, 5, 0), dynamic={"past[2]": {2: "cached"}}))
    assert found.startswith("dynamic names 'past[2]', which is not an argument of this call; it has past, past[0], past[0][0],")


class Crossed(Cached):
    """A decoder that also reads a cache of its source, which does not grow."""

    def forward(self, ids: torch.Tensor, past: Past, cross: Past) -> tuple[torch.Tensor, Past]:  # pyright: ignore
        x, new = super().forward(ids, past)
        return x + sum((k * v).sum(2).flatten(1)[:, None] for k, v in cross), new


def crossed_call(cached: int, source: int) -> tuple[object, ...]:
    cross = [tuple(normal(2, 2, source, 8, seed=50 + 10 * layer + index) for index in range(2)) for layer in range(2)]
    return *cached_call(2, 3, cached, 0), cross


@pytest.mark.parametrize("source", [10, 5])
def test_the_cache_of_a_source_has_its_own_length(source):
    """Also one that is as long in the example, where the caller's names tell the two apart."""
    model, dynamic = seeded(Crossed).eval(), {"past": {2: "cached"}, "cross": {2: "source"}}
    program = capture(model, crossed_call(5, source), dynamic=dynamic).program
    assert {item.name for item in program.signature.dimensions.values()} == {"cached", "source"}
    call = crossed_call(9, 7)
    with torch.no_grad():
        # Float32 sums in another order.
        torch.testing.assert_close(program(*call)[0], model(*call)[0], rtol=1e-5, atol=1e-5)
