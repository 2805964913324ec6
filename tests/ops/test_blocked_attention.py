"""`lissom.ops.blocked_attention`: the operator by key blocks against the reference with a mask of all pairs, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.ops.block_sparse_attention import block_sparse_attention
from lissom.ops.blocked_attention import attend_by_blocks, block_sparse_attention_reference
from lissom.ops.key_blocks import KeyBlocks, key_blocks
from lissom.ops.pattern import LAYOUT, Condition, Pattern

CAUSAL = Condition(-1, 1, high=0)
FIRST = Condition(0, 1, high=4)

# float64: sums of a thousand terms in another order.
ALLOWED = 1e-12


def window(left, right, unit=1):
    return Condition(-1, 1, low=-left, high=right, unit=unit)


PATTERNS = {
    "window": Pattern(((window(40, 25),),)),
    "causal window": Pattern(((window(70, 0),),)),
    "window of units": Pattern(((window(2, 1, 24),),)),
    "far window": Pattern(((window(200, -100),),)),
    "window and sinks": Pattern(((window(30, 0),), (CAUSAL, FIRST))),
    "window and global tokens": Pattern(((window(20, 20),), (FIRST,), (Condition(1, 0, high=2),))),
    "fixed": Pattern(((CAUSAL, Condition(-1, 1, low=0, unit=32)), (CAUSAL, Condition(0, 1, low=29, high=31, modulus=32)))),
    "two strides": Pattern(((Condition(0, 1, low=0, high=1, modulus=9),), (Condition(0, 1, high=0, modulus=12),), (FIRST,))),
    "blocks": Pattern(((LAYOUT,),), 32),
    "causal blocks": Pattern(((LAYOUT, CAUSAL),), 16),
    "blocks and window": Pattern(((LAYOUT,), (window(17, 17),), (FIRST,)), 32),
    "nothing": Pattern(()),
}
"""Patterns that have rules for all lengths."""


def layout_of(pattern, heads, rows, columns, seed, dense=0):
    if not any(condition.asks_layout for conditions in pattern.alternatives for condition in conditions):
        return None
    layout = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.25
    for row in range(dense):
        layout[:, -row if row else 0] = True
    return layout


def numbers(*sizes, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)), dtype=torch.float64)


def bias_of(kind, batch, heads, queries, keys):
    if kind == "none":
        return None
    if kind == "padding":
        return torch.arange(keys) < torch.tensor([max(1, keys - 50 * b) for b in range(batch)])[:, None, None, None]
    if kind == "hidden":
        hidden = torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(keys)) < 0.4
        return torch.zeros(batch, 1, queries, keys, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    sizes = {"of a head": (1, heads, queries, keys), "of keys": (keys,), "of queries": (1, 1, queries, 1)}
    return numbers(*sizes[kind])


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(list(PATTERNS)),
    batch=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    queries=st.one_of(st.integers(1, 70), st.integers(200, 400)),
    other_keys=st.sampled_from([None, 1, 63, 300]),
    depth=st.sampled_from([(16, 16), (32, 24), (128, 128)]),
    bias=st.sampled_from(["none", "padding", "hidden", "of a head", "of keys", "of queries"]),
    layout=st.tuples(st.booleans(), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.integers(0, 2)),
    softcap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
)
def test_numbers(name, batch, heads, queries, other_keys, depth, bias, layout, softcap, with_sinks):
    (count, key_count), (head_dim, value_dim), keys = heads, depth, other_keys or queries
    pattern = PATTERNS[name]
    by_head, rows, columns, seed, dense = layout
    table = layout_of(pattern, count if by_head else 1, rows, columns, seed, dense)
    reads = key_blocks(pattern, table)
    assert isinstance(reads, KeyBlocks), reads
    q, k, v = (
        numbers(batch, number, tokens, size, seed=place)
        for place, (number, tokens, size) in enumerate(
            [(count, queries, head_dim), (key_count, keys, head_dim), (key_count, keys, value_dim)]
        )
    )
    beside = bias_of(bias, batch, count, queries, keys)
    options = {"scale": head_dim**-0.5, "softcap": softcap, "sinks": numbers(1, count, 1, 1) if with_sinks else None}
    found = attend_by_blocks(q, k, v, beside, table, pattern, reads, **options)
    wanted = block_sparse_attention_reference(q, k, v, beside, table, pattern=pattern.encode(), block=pattern.block, **options)
    assert found.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=ALLOWED, atol=ALLOWED)


@pytest.mark.parametrize("name", ["window and global tokens", "blocks and window"])
def test_gradients(name):
    pattern = PATTERNS[name]
    layout = layout_of(pattern, 1, 6, 6, 1)
    operands = [numbers(1, 2, 180, 16), numbers(1, 1, 180, 16, seed=1), numbers(1, 1, 180, 16, seed=2), numbers(1, 1, 1, 180)]
    operands.append(numbers(1, 2, 1, 1))
    gradients = []
    for form in (block_sparse_attention, block_sparse_attention_reference):
        *given_, sinks = (item.clone().requires_grad_() for item in operands)
        options = {"pattern": pattern.encode(), "block": pattern.block, "scale": 0.25, "softcap": 3.0, "sinks": sinks}
        form(*given_, layout, **options).square().sum().backward()
        gradients.append([item.grad for item in (*given_, sinks)])
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=ALLOWED, atol=ALLOWED)


STRIDED = Pattern(((window(20, 0),), (CAUSAL, Condition(-1, 1, low=0, high=0, unit=64, modulus=4))))


def test_a_pattern_without_rules_is_gathered_at_each_length():
    assert "grows with the length" in key_blocks(STRIDED, None)
    q, k, v = numbers(3, 1, 2, 700, 16).unbind(0)
    reads = key_blocks(STRIDED, None, 700, 700)
    assert isinstance(reads, KeyBlocks) and reads.slots <= 4
    found = attend_by_blocks(q, k, v, None, None, STRIDED, reads, scale=0.25)
    wanted = block_sparse_attention_reference(q, k, v, pattern=STRIDED.encode(), block=64, scale=0.25)
    torch.testing.assert_close(found, wanted, rtol=ALLOWED, atol=ALLOWED)


def test_a_layout_that_is_written_to_is_read_anew():
    """Key blocks of a layout are found once, for as long as nothing writes to it."""
    pattern = PATTERNS["blocks and window"]
    q, k, v = (numbers(1, 2, 300, 4, seed=seed) for seed in range(3))
    layout = layout_of(pattern, 1, 10, 10, 0)
    options = {"pattern": pattern.encode(), "block": pattern.block, "scale": 0.5}
    for _ in range(2):
        for _ in range(2):
            found = block_sparse_attention(q.requires_grad_(), k, v, None, layout, **options)
            wanted = block_sparse_attention_reference(q, k, v, None, layout, **options)
            assert (found - wanted).abs().max() < ALLOWED
        layout.logical_not_()
        layout[:, 3] = True


def test_blocks_of_few_tokens_are_refused_with_a_reason():
    pattern = Pattern(((LAYOUT,),), 8)
    assert key_blocks(pattern, torch.ones(1, 2, 2, dtype=torch.bool)) == (
        "its layout has blocks of 8 tokens, and products of fewer than 16 gain nothing"
    )


def test_rows_that_see_everything_do_not_widen_the_others():
    layout = torch.eye(20, dtype=torch.bool)[None].clone()
    layout[:, 0], layout[:, 13] = True, True
    reads = key_blocks(Pattern(((LAYOUT,),), 64), layout)
    assert isinstance(reads, KeyBlocks)
    assert (reads.slots, reads.dense_rows, reads.dense_end) == (1, (0, 13), None)


def test_scores_of_a_window_grow_with_the_length():
    reads = key_blocks(PATTERNS["window"], None)
    assert isinstance(reads, KeyBlocks)
    assert reads.pairs(64000, 64000) == 10 * reads.pairs(6400, 6400) == 64000 * 3 * 64


def test_the_operator_is_one_node_of_a_captured_program():
    pattern = PATTERNS["window"]

    class Windowed(torch.nn.Module):
        def forward(self, x):
            return block_sparse_attention(x, x, x, pattern=pattern.encode(), block=64, scale=0.25)

    module = Windowed()
    program = torch.export.export(module, (torch.randn(1, 2, 300, 16),), strict=False)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets == [block_sparse_attention]
