"""`lissom::fused_attention`: kernel and reference against `lissom::attention` in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.compiler.verify.divergence import relative_error
from lissom.ops.attention import attention_reference
from lissom.ops.fused_attention import (
    fused_attention,
    fused_attention_reference,
    merged_attention,
    merged_attention_reference,
    unpadded_attention,
    unpadded_attention_reference,
)
from lissom.ops.native import kernel_dtypes, load_kernels
from tests.ops.patterns import slots_and_rows

# float32: sums in another order and an exponential good to 2e-7.  bfloat16: weights and result rounded once each.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 1.5e-2}
# In bfloat16 the reference rounds the scores as well, numbers up to 4 here: weights are then off by up to 4 * 4e-3 more.
SCORES_ROUNDED = 1.6e-2
# The reference takes both; where there are kernels, the operator takes what they do.
DTYPES = kernel_dtypes() or tuple(ALLOWED)
load_kernels()
FORMS = {"operator": fused_attention, "reference": fused_attention_reference}
MASKS = ["none", "padding", "bias", "bias of a head", "seen", "cache", "window", "low bias", "hidden bias"]


def numbers(*sizes, dtype=torch.float32, seed=0):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


def mask_of(kind, batch, heads, queries, keys):
    if kind == "none":
        return None
    if kind == "padding":
        return torch.arange(keys) < torch.tensor([max(1, keys - 2 * b) for b in range(batch)])[:, None, None, None]
    if kind in ("cache", "window", "low bias", "hidden bias"):
        return cache_mask(kind, batch, queries, keys)
    if kind == "seen":
        seen = numbers(batch, 1, queries, keys) > 0
        return seen | (torch.arange(keys) == 0)
    return numbers(*((1, heads) if kind == "bias of a head" else (1, 1)), queries, keys)


def cache_mask(kind, batch, queries, keys):
    """The queries stand in the middle of a cache: what is behind them is hidden, and what is far in front of them."""
    place = torch.arange(queries)[:, None] + max(keys // 2 - queries, 0)
    seen = torch.arange(keys) <= place
    if kind == "window":
        seen = seen & (torch.arange(keys) > place - 9)
    seen = seen.repeat(batch, 1, 1, 1)
    seen[0, :, :, 0] = queries > 1
    if kind in ("cache", "window"):
        return seen
    hidden = torch.finfo(torch.float32).min if kind == "low bias" else -torch.inf
    bias = torch.zeros(batch, 1, queries, keys).masked_fill(~seen, hidden)
    bias[-1, :, -1] = torch.finfo(torch.float32).min  # a row of these alone sees all keys alike
    return bias


@settings(max_examples=250, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    queries=st.one_of(st.integers(1, 5), st.integers(1, 70)),
    keys=st.one_of(st.integers(1, 70), st.integers(200, 300)),
    depth=st.sampled_from([(8, 8), (32, 32), (7, 5), (40, 24), (64, 64), (80, 33)]),
    mask=st.sampled_from(MASKS),
    softcap=st.sampled_from([0.0, 2.0]),
    with_sinks=st.booleans(),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(list(FORMS)),
)
def test_numbers(batch, heads, queries, keys, depth, mask, softcap, with_sinks, causal, dtype, form):
    (count, key_count), (head_dim, value_dim) = heads, depth
    # Laid out as a merged projection leaves them: [batch, tokens, heads, head_dim], transposed.
    q, k, v = (
        numbers(batch, tokens, number, size, dtype=dtype, seed=seed).transpose(1, 2)
        for seed, (tokens, number, size) in enumerate(
            [(queries, count, head_dim), (keys, key_count, head_dim), (keys, key_count, value_dim)]
        )
    )
    bias = mask_of(mask, batch, count, queries, keys)
    sinks = numbers(1, count, 1, 1) if with_sinks else None
    options = {"scale": head_dim**-0.5, "softcap": softcap, "sinks": sinks}
    seen = torch.ones(queries, keys, dtype=torch.bool).tril() if causal else torch.ones(queries, keys, dtype=torch.bool)
    if bias is None or bias.dtype == torch.bool:
        whole = seen if bias is None else bias & seen
    else:
        whole = bias.double().masked_fill(~seen, -torch.inf)
    group = count // key_count
    wanted = attention_reference(q.double(), *(item.double().repeat_interleave(group, 1) for item in (k, v)), whole, **options)
    # A row that sees nothing has no weights; what the operator gives for it is a test of its own.
    blind = ~whole if whole.dtype == torch.bool else whole == -torch.inf
    wanted = wanted.masked_fill(blind.all(-1, keepdim=True), 0.0)
    found = FORMS[form](q, k, v, bias, causal=causal, **options)
    assert found.shape == (batch, count, queries, value_dim)
    assert found.transpose(1, 2).is_contiguous()
    rounded = SCORES_ROUNDED if form == "reference" and dtype == torch.bfloat16 else 0.0
    assert relative_error(wanted, found.double()) < ALLOWED[dtype] + rounded


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_row_that_sees_nothing_yields_zeros(form, with_bias):
    q, k, v = numbers(3, 1, 2, 5, 8).unbind(0)
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    mask = torch.zeros(5, 5).masked_fill(~seen, -torch.inf) if with_bias else seen
    found = FORMS[form](q, k, v, mask, scale=0.3)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=0.3)
    assert torch.all(found[:, :, 2] == 0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 6])
def test_a_low_bias_counts_where_causality_leaves_nothing_else(form, queries):
    """A row's only key has float32's lowest bias, and keys behind it that have none are hidden by causality."""
    q, k, v = numbers(2, 1, queries, 8), *numbers(2, 2, 1, 6, 8).unbind(0)
    bias = torch.zeros(2, 1, queries, 6)
    bias[:, :, 0, 0] = torch.finfo(torch.float32).min
    found = FORMS[form](q, k, v, bias, scale=0.3, causal=True)
    torch.testing.assert_close(found[:, :, 0], v[:, :, 0], rtol=0, atol=1e-6)


def test_hidden_key_has_no_part_however_large_its_value():
    q, k, v = numbers(3, 1, 1, 4, 8).unbind(0)
    v = v.clone()
    v[:, :, 3] = 1e30
    seen = torch.tensor([True, True, True, False])
    assert fused_attention(q, k, v, seen, scale=1.0).abs().max() < 10


def test_long_rows_and_many_heads_over_threads():
    q, k, v = (numbers(1, 2, 600, 16, seed=seed) for seed in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert relative_error(wanted, fused_attention(q, k, v, scale=0.25, causal=True).double()) < ALLOWED[torch.float32]


@pytest.mark.parametrize("form", [merged_attention, merged_attention_reference], ids=["operator", "reference"])
@pytest.mark.parametrize(
    ("heads", "key_heads", "tokens", "mask"), [(4, 4, 7, "padding"), (4, 2, 33, "none"), (6, 1, 1, "bias")]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_merged_projection(form, heads, key_heads, tokens, mask, dtype):
    qkv = numbers(2, tokens, (heads + 2 * key_heads) * 8, dtype=dtype)
    bias = mask_of(mask, 2, heads, tokens, tokens)
    q, k, v = (
        item.reshape(2, tokens, -1, 8).transpose(1, 2).double()
        for item in qkv.split([heads * 8, key_heads * 8, key_heads * 8], -1)
    )
    k, v = (item.repeat_interleave(heads // key_heads, 1) for item in (k, v))
    wanted = attention_reference(q, k, v, bias, scale=0.3).transpose(1, 2).flatten(2)
    found = form(qkv, bias, heads=heads, key_heads=key_heads, scale=0.3)
    assert found.is_contiguous()
    assert relative_error(wanted, found.double()) < ALLOWED[dtype]


def unpadded(kind, seen):
    """Slots and rows of texts without padding, and the mask, in a layout that `pack-tokens` makes, or in another."""
    slots, rows = slots_and_rows(seen)
    mask = seen[:, None, None].expand(-1, 1, seen.shape[1], -1)
    if kind == "bias":
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None, None]
    elif kind == "heads":
        mask = mask & (torch.arange(4)[:, None, None] * 3 <= torch.arange(seen.shape[1]))
    elif kind == "triangle":
        mask = mask & torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool).tril()
    elif kind == "other rows":
        rows = rows.flip(0)[::2]
    elif kind == "later rows":
        rows = rows[rows % seen.shape[1] > 1]
    elif kind == "scattered":
        place = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        slots = place[slots]
    return slots, rows, mask


@pytest.mark.parametrize("form", [unpadded_attention, unpadded_attention_reference], ids=["operator", "reference"])
@pytest.mark.parametrize(
    "kind", ["packed", "hole", "bias", "heads", "triangle", "other rows", "scattered", "causal", "window", "later rows"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_without_padding_attend_as_padded_ones_do(form, kind, dtype):
    seen = torch.arange(70) < torch.tensor([70, 3, 41, 1, 0])[:, None]
    if kind == "hole":
        seen[2, 5] = False
    slots, rows, mask = unpadded(kind, seen)
    q, k, v = numbers(1, int(slots.max()) + 1, 4 + 2 + 2, 8, dtype=dtype).transpose(1, 2).split([4, 2, 2], 1)
    band = {"causal": (None, 0), "window": (-9, 4), "later rows": (-20, -1)}.get(kind, (None, None))
    i = torch.arange(slots.shape[1])
    low, high = (bound if bound is not None else sign * 99 for bound, sign in zip(band, (-1, 1), strict=True))
    whole = mask & (i - i[:, None] >= low) & (i - i[:, None] <= high) if band != (None, None) else mask
    padded = (item[0][:, slots].transpose(0, 1).double() for item in (q, k, v))
    wanted = fused_attention_reference(*padded, whole, scale=0.3, softcap=2.0).transpose(1, 2).flatten(0, 1)[rows]
    found = form(q, k, v, slots, rows, mask, scale=0.3, softcap=2.0, low=band[0], high=band[1])
    assert found.transpose(1, 2).is_contiguous()
    assert relative_error(wanted, found[0].transpose(0, 1).double()) < ALLOWED[dtype]


def test_tokens_that_are_not_there_are_refused():
    q, rows = numbers(1, 1, 4, 8), torch.tensor([0, 3])
    for form in (unpadded_attention, unpadded_attention_reference):
        for slots, taken in ((torch.tensor([[0, 4]]), rows[:1]), (torch.tensor([[0, -5]]), rows[:1]), (rows[None], rows)):
            with pytest.raises((IndexError, RuntimeError)):
                form(q, q, q, slots, taken, scale=1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("queries", [1, 3, 9])
def test_keys_and_values_kept_in_bytes(form, queries):
    keys, depth = 130, 24
    q = numbers(2, 4, queries, depth)
    k, v = (torch.randint(-127, 128, (2, 2, keys, depth), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    scales = [numbers(2, 2, keys, 1, seed=seed).abs() / 100 for seed in (2, 3)]
    mask = cache_mask("cache", 2, queries, keys)
    exact = [(item * by.double()).repeat_interleave(2, 1) for item, by in zip((k, v), scales, strict=True)]
    wanted = attention_reference(q.double(), *exact, mask, scale=0.2)
    wanted = wanted.masked_fill((~mask).all(-1, keepdim=True), 0.0)
    kept = (item.to(torch.int8) for item in (k, v))
    found = FORMS[form](q, *kept, mask, scale=0.2, k_scale=scales[0], v_scale=scales[1])
    assert relative_error(wanted, found.double()) < ALLOWED[torch.float32]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_no_causal_window_are_zeros(dtype, threads):
    """Windows that begin behind the last key causality shows: memory beyond what was made for no keys was read and written."""
    q, k, v = (numbers(3, 4, tokens, 8, dtype=dtype) for tokens in (54, 279, 279))
    keys, first = torch.arange(279), 270 - torch.arange(54)[:, None]
    seen = ((keys >= first) & (keys < first + 9)).expand(3, 1, 54, 279)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = fused_attention(q, k, v, seen, scale=0.3, causal=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, torch.zeros_like(found))


def pooled_mask(queries, keys, window=None):
    """Each query sees two stretches of keys, far from each other, as sequences in a pool of slots do that share their start."""
    slots, rows = torch.arange(keys), torch.arange(queries)[:, None]
    own = 400 + 40 * (rows % 3)
    seen = (slots < 48) | ((slots >= own) & (slots <= own + rows))
    return (seen if window is None else seen & (slots > own + rows - window))[None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 1), (4, 4), (3, 1)])
@pytest.mark.parametrize("queries", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5]).view(1, 1, 1)}])
def test_keys_in_stretches_far_from_each_other(dtype, heads, queries, options):
    q = numbers(1, heads[0], queries, 32, dtype=dtype)
    k, v = (numbers(1, heads[1], 700, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    mask = pooled_mask(queries, 700)
    found = fused_attention(q, k, v, mask, scale=0.3, **options)
    wanted = fused_attention_reference(q.float(), k.float(), v.float(), mask, scale=0.3, **options)
    assert relative_error(wanted, found.float()) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 1), (4, 4), (3, 1)])
@pytest.mark.parametrize("window", [None, 21])
def test_few_queries_are_independent_of_each_other(dtype, heads, window):
    """A query's row has the same bits alone and among fifteen others: verifying a draft gives the tokens of decoding."""
    q = numbers(1, heads[0], 16, 32, dtype=dtype)
    k, v = (numbers(1, heads[1], 700, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    causal = torch.arange(700) <= 300 + torch.arange(16)[:, None]
    masks = [pooled_mask(16, 700), (causal if window is None else causal & (torch.arange(700) > 300 - window))[None, None]]
    for mask in masks:
        whole = fused_attention(q, k, v, mask, scale=0.3)
        for begin, end in ((0, 1), (5, 6), (3, 8), (14, 16)):
            assert torch.equal(
                fused_attention(q[:, :, begin:end], k, v, mask[:, :, begin:end], scale=0.3), whole[:, :, begin:end]
            )


def sequences_mask(lengths, window=None):
    """The queries of sequences, each of its own 300 slots: so many for each, which see those before and with them."""
    slots, parts = torch.arange(300 * len(lengths)), list[torch.Tensor]()
    for index, length in enumerate(lengths):
        own = 300 * index + 100 + torch.arange(length)[:, None]
        seen = (slots >= 300 * index) & (slots <= own)
        parts.append(seen if window is None else seen & (slots > own - window))
    return torch.cat(parts)[None, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 1), (4, 4), (3, 1)])
@pytest.mark.parametrize("lengths", [(60, 1, 1, 1), (1, 1, 40, 1, 20, 1, 1), (1,) * 40, (17, 16, 18), (9, 9, 9)])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "sinks": torch.tensor([0.5]).view(1, 1, 1)}, {"window": 21}])
def test_sequences_of_one_call_are_independent_of_each_other(dtype, heads, lengths, options):
    window, options = options.get("window"), {name: value for name, value in options.items() if name != "window"}
    mask = sequences_mask(lengths, window)
    keys, queries = mask.shape[-1], sum(lengths)
    q = numbers(1, queries, heads[0], 32, dtype=dtype).transpose(1, 2)
    k, v = (numbers(1, heads[1], keys, 32, dtype=dtype, seed=seed) for seed in (1, 2))
    found = fused_attention(q, k, v, mask, scale=0.3, **options)
    wanted = fused_attention_reference(q.float(), k.float(), v.float(), mask, scale=0.3, **options)
    assert relative_error(wanted, found.float()) <= ALLOWED[dtype]
    for part, length in enumerate(lengths):
        begin = sum(lengths[:part])
        own = slice(begin, begin + length)
        alone = fused_attention(q[:, :, own], k, v, mask[:, :, own], scale=0.3, **options)
        assert torch.equal(alone, found[:, :, own])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_of_a_causal_call(dtype):
    """Causality hides keys that the mask shows."""
    q, k, v = (numbers(1, 2, 600, 32, dtype=dtype, seed=seed) for seed in range(3))
    mask = sequences_mask((300, 1)).flatten(0, 2)
    mask = torch.cat([mask[:300], mask[300:].expand(300, -1)])[None, None]
    found = fused_attention(q, k, v, mask, scale=0.3, causal=True)
    wanted = fused_attention_reference(q.float(), k.float(), v.float(), mask, scale=0.3, causal=True)
    assert relative_error(wanted, found.float()) <= ALLOWED[dtype]
