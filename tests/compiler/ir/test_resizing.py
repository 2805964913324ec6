"""Tests of lissom.compiler.ir.resizing, through a signature."""

import torch

from lissom.frontends.capture.export import capture
from tests.support.models import capture_of, captured, normal, tokens


def sizes_at(signature, example, **wanted):
    """Sizes for `resize`, by the names of the dimensions."""
    return {symbol: wanted[signature.dimensions[symbol].name] for symbol in signature.sizes_of(example)}


def test_resizing_draws_rows_and_positions_from_the_example():
    signature = captured("bert").signature
    example = [tokens(), tokens(seed=1)]
    ids, _ = signature.resize(example, sizes_at(signature, example, batch=3, sequence=7))
    assert ids.shape == (3, 7)
    assert set(ids.flatten().tolist()) <= set(example[0].flatten().tolist())


def test_arguments_that_share_a_dimension_share_the_draw():
    signature = captured("bert").signature
    example = [tokens(), tokens() + 100]
    ids, others = signature.resize(example, sizes_at(signature, example, batch=4, sequence=6))
    assert torch.equal(ids + 100, others)


def test_the_same_seed_gives_the_same_sample():
    signature = captured("feed_forward").signature
    example = [normal(2, 5, 8)]
    sizes = sizes_at(signature, example, batch=3, sequence=4)
    assert torch.equal(signature.resize(example, sizes, seed=3)[0], signature.resize(example, sizes, seed=3)[0])


def test_rows_differ_where_the_example_has_one():
    signature = captured("bert").signature
    example = [tokens(1, 8), torch.ones(1, 8, dtype=torch.long)]
    ids, _ = signature.resize(example, sizes_at(signature, example, batch=3, sequence=8))
    assert len(set(map(tuple, ids.tolist()))) == 3


def test_positions_go_on_counting():
    signature = captured("bert").signature
    example = [torch.arange(3, 8).expand(2, 5), tokens()]
    positions, _ = signature.resize(example, sizes_at(signature, example, batch=3, sequence=7))
    assert positions.tolist() == [list(range(3, 10))] * 3


def test_causal_mask_stays_causal_and_queries_see_themselves() -> None:
    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)

    causal = torch.zeros(6, 6).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
    window = causal.masked_fill(torch.ones(6, 6, dtype=torch.bool).tril(-2), -torch.inf)
    signature = capture(Masked(), (normal(2, 6, 8), causal)).program.signature
    _, resized = signature.resize(
        [normal(2, 6, 8), causal], sizes_at(signature, [normal(2, 6, 8), causal], batch=3, sequence=9)
    )
    assert torch.equal(resized == 0, torch.ones(9, 9, dtype=torch.bool).tril())
    _, resized = signature.resize(
        [normal(2, 6, 8), window], sizes_at(signature, [normal(2, 6, 8), window], batch=3, sequence=9)
    )
    assert bool((resized.diagonal() == 0).all())


def test_positions_thinned_out_keep_first_and_last_and_go_on_counting() -> None:
    signature = captured("bert").signature
    ids = torch.arange(100, 109) * torch.tensor([[1], [10]])
    sizes = sizes_at(signature, [ids, ids], batch=2, sequence=3)
    thin, positions = signature.thinned([ids, torch.arange(9).expand(2, 9)], sizes)
    assert thin.tolist() == [[100, 104, 108], [1000, 1040, 1080]]
    assert positions.tolist() == [[0, 1, 2]] * 2


def test_a_size_out_of_range_gives_no_sample() -> None:
    found = capture_of("blocked")
    symbol = found.program.signature.lengths[0]
    assert found.program.signature.sample_at(found.example, {symbol: 7}) is None
    sample = found.program.signature.sample_at(found.example, {symbol: 8})
    assert sample is not None and sample[0].shape[1] == 8
