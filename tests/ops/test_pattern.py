"""Patterns of sparse attention: their blocks against their tokens, and hand-written masks."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lissom.ops.pattern import LAYOUT, Condition, Pattern

FACTORS = st.tuples(st.sampled_from((-1, 0, 1)), st.sampled_from((-1, 1)))
CONDITIONS = st.builds(
    lambda factors, low, length, unit, modulus: Condition(*factors, low, low + length, unit, modulus),
    FACTORS,
    st.integers(-12, 8),
    st.integers(0, 12),
    st.sampled_from((1, 3, 8)),
    st.sampled_from((0, 2, 5)),
)
PATTERNS = st.builds(
    Pattern,
    st.lists(st.lists(st.one_of(st.just(LAYOUT), CONDITIONS), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(
        tuple
    ),
    st.sampled_from((4, 8)),
)


@given(PATTERNS, st.integers(1, 40), st.integers(1, 40), st.sampled_from((4, 7, 16)), st.integers(0, 99))
def test_blocks_miss_no_token_that_is_seen(pattern: Pattern, queries: int, keys: int, block: int, seed: int) -> None:
    layout = torch.rand(2, 1 + seed % 5, 1 + seed % 7, generator=torch.Generator().manual_seed(seed)) > 0.5
    seen = pattern.mask(queries, keys, layout).expand(2, -1, -1)
    some, whole = pattern.blocks(queries, keys, block, layout)
    for row in range(some.shape[1]):
        for column in range(some.shape[2]):
            tile = seen[:, row * block : (row + 1) * block, column * block : (column + 1) * block].flatten(1)
            assert not (tile.any(1) & ~some[:, row, column]).any()
            assert not (whole[:, row, column] & ~tile.all(1)).any()


@given(PATTERNS)
def test_encoding_is_inverse_to_decoding(pattern: Pattern) -> None:
    assert Pattern.decode(pattern.encode(), pattern.block) == pattern


def test_a_causal_window_is_a_band() -> None:
    seen = Pattern(((Condition(1, -1, low=0, high=2),),)).mask(7, 7)
    ones = torch.ones(1, 7, 7, dtype=torch.bool)
    assert torch.equal(seen, ones.tril() & ones.triu(-2))


def test_strided_pattern_has_last_tokens_and_every_fourth() -> None:
    window, stride = (Condition(1, -1, low=0, high=3),), (Condition(1, -1, low=0), Condition(1, -1, low=0, high=0, modulus=4))
    seen = Pattern((window, stride)).mask(20, 20)[0]
    for i in range(20):
        assert [j for j in range(20) if seen[i, j]] == [j for j in range(i + 1) if i - j < 4 or (i - j) % 4 == 0]


def test_tokens_behind_a_layout_count_to_its_last_block() -> None:
    layout = torch.tensor([[[True, False], [False, True]]])
    seen = Pattern(((LAYOUT,),), block=2).mask(6, 7, layout)[0]
    assert seen[:2].tolist() == [[True, True, *[False] * 5]] * 2
    assert seen[2:].tolist() == [[False, False, *[True] * 5]] * 4
