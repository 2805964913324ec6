"""Tests of lissom.compiler.ir.samples."""

import torch

from lissom.compiler.ir.samples import check_samples, resize, spread, varied_samples
from lissom.frontends.capture.export import capture
from tests.support.models import capture_of, captured, normal, tokens


def sizes_at(signature, example, **wanted):
    """Sizes for `resize`, by the names of the dimensions."""
    return {symbol: wanted[signature.dimensions[symbol].name] for symbol in signature.sizes_of(example)}


def test_resizing_draws_rows_and_positions_from_the_example():
    signature = captured("bert").signature
    example = [tokens(), tokens(seed=1)]
    ids, _ = resize(signature, example, sizes_at(signature, example, batch=3, sequence=7))
    assert ids.shape == (3, 7)
    assert set(ids.flatten().tolist()) <= set(example[0].flatten().tolist())


def test_arguments_that_share_a_dimension_share_the_draw():
    signature = captured("bert").signature
    example = [tokens(), tokens() + 100]
    ids, others = resize(signature, example, sizes_at(signature, example, batch=4, sequence=6))
    assert torch.equal(ids + 100, others)


def test_the_same_seed_gives_the_same_sample():
    signature = captured("feed_forward").signature
    example = [normal(2, 5, 8)]
    sizes = sizes_at(signature, example, batch=3, sequence=4)
    assert torch.equal(resize(signature, example, sizes, seed=3)[0], resize(signature, example, sizes, seed=3)[0])


def test_rows_differ_where_the_example_has_one():
    signature = captured("bert").signature
    example = [tokens(1, 8), torch.ones(1, 8, dtype=torch.long)]
    ids, _ = resize(signature, example, sizes_at(signature, example, batch=3, sequence=8))
    assert len(set(map(tuple, ids.tolist()))) == 3


def test_positions_go_on_counting():
    signature = captured("bert").signature
    example = [torch.arange(3, 8).expand(2, 5), tokens()]
    positions, _ = resize(signature, example, sizes_at(signature, example, batch=3, sequence=7))
    assert positions.tolist() == [list(range(3, 10))] * 3


def test_checks_run_on_example_and_masked_variant():
    found = capture_of("bert")
    first, second = check_samples(found.program.signature, found.example)
    assert [tensor.shape for tensor in first] == [(2, 5), (2, 5)]
    assert [tensor.shape for tensor in second] == [(3, 7), (3, 7)]
    assert first[1].all()
    assert not second[1].all()


def test_a_variant_meets_the_conditions_of_the_model():
    found = capture_of("blocked")
    _, second = check_samples(found.program.signature, found.example)
    assert second[0].shape == (4, 16, 8)


def test_a_variant_stays_under_the_maximum():
    found = capture_of("bert")
    example = [tokens(2, 32), torch.ones(2, 32, dtype=torch.long)]
    _, second = check_samples(found.program.signature, example)
    assert second[0].shape == (1, 16)


def test_samples_are_spread_over_the_data() -> None:
    data = [[torch.zeros(64, 64)] for _ in range(10)]
    assert [item is found for item, found in zip(data[::5], spread(data, 8192), strict=True)] == [True, True]
    assert len(spread(data[:1], 8192)) == 1
    assert len(spread([[torch.zeros(2, 3)]] * 4, 8192)) == 4
    assert spread([], 8192) == []


def test_causal_mask_stays_causal_and_queries_see_themselves() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)

    causal = torch.zeros(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    window = causal.masked_fill(torch.ones(6, 6, dtype=torch.bool).tril(-2), -torch.inf)
    signature = capture(Masked(), (normal(2, 6, 8), causal)).program.signature
    _, resized = resize(
        signature, [normal(2, 6, 8), causal], sizes_at(signature, [normal(2, 6, 8), causal], batch=3, sequence=9)
    )
    assert torch.equal(resized == 0, torch.ones(9, 9, dtype=torch.bool).tril())
    _, resized = resize(
        signature, [normal(2, 6, 8), window], sizes_at(signature, [normal(2, 6, 8), window], batch=3, sequence=9)
    )
    assert bool((resized.diagonal() == 0).all())


def test_every_padding_form_is_tried_in_both_polarities() -> None:
    for usual in (1, 0):
        found = [mask for _, mask in varied_samples([normal(2, 6, 8), torch.full((2, 6), usual)])[1:]]
        places = [(mask != usual).tolist() for mask in found]
        end, start = [[False] * 6, [False] * 4 + [True] * 2], [[True, True, False, False, False, False], [False] * 6]
        assert end in places and start in places and [[True] * 6, [False] * 6] in places
