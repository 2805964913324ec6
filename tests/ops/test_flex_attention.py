"""FlexAttention as the operator `lissom::block_sparse_attention` uses it: here on the CPU, marked tests on a GPU."""

import pytest
import torch

from lissom.compiler.verify.divergence import relative_error
from lissom.ops import block_sparse_attention
from lissom.ops.blocked_attention import block_sparse_attention_reference
from lissom.ops.flex_attention import BLOCK, block_mask, flex_block_sparse_attention
from lissom.ops.pattern import LAYOUT, Condition, Pattern
from tests.ops.patterns import PATTERNS, layout_of, mask_of, numbers, projected

# Not compiled, FlexAttention says so once a process.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ALLOWED = 5e-6  # sums in float32, in another order
FEW = {name: pattern for name, pattern in PATTERNS.items() if name != "many"}


def check(call, pattern, q, k, v, bias=None, layout=None, softcap=0.0, sinks=None, allowed=ALLOWED):
    options = {"pattern": pattern.encode(), "block": pattern.block, "scale": 0.2, "softcap": softcap, "sinks": sinks}
    found = call(q, k, v, bias, layout, **options)
    wanted = block_sparse_attention_reference(q.double(), k.double(), v.double(), bias, layout, **options)
    assert found.transpose(1, 2).is_contiguous()
    assert relative_error(wanted, found.double()) < allowed


def uncompiled(*args, **options):
    return flex_block_sparse_attention(*args, **options, compiled=False)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("tokens", [(128, 128), (150, 290)])
def test_every_kind_of_pattern(name, tokens):
    pattern = PATTERNS[name]
    check(uncompiled, pattern, *projected(2, (4, 2), tokens, (16, 16), torch.float32), layout=layout_of(pattern, 4, *tokens))


@pytest.mark.parametrize("mask", ["padding", "bias", "hidden bias", "seen"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_masks_caps_and_sinks(mask, softcap, with_sinks):
    q, k, v = projected(2, (2, 2), (140, 140), (8, 5), torch.float32)
    bias, sinks = mask_of(mask, 2, 2, 140, 140), numbers(1, 2, 1, 1) if with_sinks else None
    check(uncompiled, PATTERNS["window"], q, k, v, bias=bias, softcap=softcap, sinks=sinks)


def test_reached_blocks_are_listed_whole_ones_apart():
    pattern = Pattern(((Condition(-1, 1, -2 * BLOCK, 0),),))
    mask = block_mask(pattern, 5 * BLOCK, 5 * BLOCK, torch.device("cpu"))
    assert mask.kv_num_blocks.tolist() == [[[1, 1, 2, 2, 2]]]
    assert mask.full_kv_num_blocks is not None and mask.full_kv_num_blocks.tolist() == [[[0, 1, 1, 1, 1]]]
    assert mask.kv_indices[0, 0, 4, :2].tolist() == [2, 4]


def test_block_that_ends_behind_last_key_is_tested():
    mask = block_mask(Pattern(((Condition(0, 1),),)), 100, 2 * BLOCK - 1, torch.device("cpu"))
    assert mask.kv_num_blocks.tolist() == [[[1]]]
    assert mask.kv_indices[0, 0, 0, 0] == 1


def test_a_mask_is_kept_until_its_layout_changes():
    pattern, layout = Pattern(((LAYOUT,),), 64), torch.zeros(1, 4, 4, dtype=torch.bool)
    layout[0, 0, 0] = True
    first = block_mask(pattern, 256, 256, torch.device("cpu"), layout)
    assert block_mask(pattern, 256, 256, torch.device("cpu"), layout) is first
    layout[0, 3, 3] = True
    assert block_mask(pattern, 256, 256, torch.device("cpu"), layout).kv_num_blocks.tolist() == [[[1, 1]]]
    with torch.inference_mode():
        assert block_mask(pattern, 256, 256, torch.device("cpu"), layout.clone()).kv_num_blocks.tolist() == [[[1, 1]]]


# Inductor warns of what it calls itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal window", "strided", "layout and window"])
def test_compiled(name):
    pattern = PATTERNS[name]
    for tokens in (256, 300):
        q, k, v = projected(1, (2, 1), (tokens, tokens), (32, 32), torch.float32)
        bias, layout = mask_of("padding", 1, 2, tokens, tokens), layout_of(pattern, 2, tokens, tokens)
        check(flex_block_sparse_attention, pattern, q, k, v, bias=bias, layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(name, dtype):
    pattern, device = PATTERNS[name], torch.device("cuda", 0)
    for queries in (1, 300):
        q, k, v = (item.to(device) for item in projected(2, (4, 2), (queries, 300), (32, 32), dtype))
        layout = layout_of(pattern, 4, queries, 300)
        layout = layout if layout is None else layout.to(device)
        # bfloat16: weights and result rounded once each. float32: Triton may multiply in TF32, of 10 bits.
        allowed = {torch.float32: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
        bias, sinks = mask_of("padding", 2, 4, queries, 300), numbers(1, 4, 1, 1).to(device)
        check(block_sparse_attention, pattern, q, k, v, layout=layout, allowed=allowed)
        check(block_sparse_attention, pattern, q, k, v, bias.to(device), layout, softcap=2.0, sinks=sinks, allowed=allowed)
