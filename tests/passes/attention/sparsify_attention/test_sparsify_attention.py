"""Tests of sparsify-attention, with masks written by hand as the oracle."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lissom.backends.base import Backend
from lissom.compiler.analysis.patterns.reader import read_pattern
from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import format_pass, parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes import PASSES
from lissom.passes.attention.sparsify_attention.attention_mass import BlockMass, fewest_blocks
from lissom.passes.attention.sparsify_attention.sparsify_attention import SparsifyAttention, random_layout, with_room
from tests.support import captures
from tests.support.harness import Calls, check_golden, every_backend, rewrite
from tests.support.models import Case, normal, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.support.neighbours import all_but_slow

MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama)}
LENGTH = 21
SEEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "{window=3}": lambda i, j: (i - j).abs() <= 3,
    "{window=2,global_tokens=2}": lambda i, j: ((i - j).abs() <= 2) | (i < 2) | (j < 2),
    "{pattern=block,block=4}": lambda i, j: i // 4 == j // 4,
    "{pattern=strided,window=1,block=4,stride=2}": lambda i, j: ((i - j).abs() <= 1) | ((i // 4) % 2 == (j // 4) % 2),
    "{pattern=dilated,window=8,block=2,dilation=3}": lambda i, j: (
        ((i // 2 - j // 2).abs() <= 12) & ((i // 2 - j // 2) % 3 == 0)
    ),
}


@cache
def exact(build: Callable[[], Case]) -> Program:
    case = build()
    return captures.optimize(case.model, case.inputs).program


def sparse(build: Callable[[], Case], passes: str) -> tuple[Program, History]:
    """The model after a pipeline text, which is given batches with padding as data."""
    program = exact(build)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    data = [program.signature.flatten((), {"input_ids": tokens(seed=seed), "attention_mask": mask}) for seed in range(3)]
    return Pipeline(parse_pipeline(passes, PASSES), samples=data[:1], data=data).run(program)


def attend(q: torch.Tensor) -> torch.Tensor:
    return scaled_dot_product_attention(q, q, q)


def test_rewrites() -> None:
    _, history = rewrite(SparsifyAttention(window=2, global_tokens=1), Calls(attend), normal(1, 2, 7, 4))
    check_golden("sparsify_attention", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(SparsifyAttention(), Calls(lambda x: x.softmax(-1) @ x), normal(2, 4, 4))
    assert history.diff(0, 1) == ""


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", SEEN)
def test_numbers(options: str, causal: bool) -> None:
    def module(q: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, q, q, is_causal=causal)

    q = normal(2, 2, LENGTH, 4)
    program, _ = rewrite(f"sparsify-attention{options}", Calls(module), q)
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]
    seen = SEEN[options](i, j) & ((j <= i) | (not causal))
    wanted = scaled_dot_product_attention(q, q, q, attn_mask=seen)
    # The same kernel under an equal mask.
    torch.testing.assert_close(program(q), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [*SEEN, "{pattern=global-window-random,window=1,block=2,global_tokens=1,random_blocks=1}"])
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_of_model_reads_as_pattern_again(name: str, options: str) -> None:
    program, history = sparse(MODELS[name], f"sparsify-attention{options}")
    attentions = [node for node in program.nodes() if is_attention(node)]
    assert history.steps[-1].rewritten == len(attentions) == 2
    for node in attentions:
        reading = read_pattern(program, node)
        assert reading.pattern is not None, reading.reason
        assert not reading.causal


def test_masks_are_made_once_for_all_layers() -> None:
    program, _ = sparse(tiny_bert, "sparsify-attention{window=1}")
    masks = {node.args[3] for node in program.nodes() if is_attention(node)}
    assert len(masks) == 1


def test_skip_and_only_name_modules() -> None:
    _, history = sparse(tiny_bert, 'sparsify-attention{window=1,skip="encoder.layer.0"}')
    assert history.steps[-1].summary == "rewrote 1 of 2; skipped 1: skip= names it"
    _, history = sparse(tiny_bert, 'sparsify-attention{window=1,only="encoder.layer.0"}')
    assert history.steps[-1].summary == "rewrote 1 of 2; skipped 1: only= does not name it"


def test_attention_to_other_tokens_stays_dense() -> None:
    module = Calls(lambda q, k: scaled_dot_product_attention(q, k, k))
    _, history = rewrite(SparsifyAttention(), module, normal(2, 2, 5, 4), normal(2, 2, 6, 4, seed=1))
    assert history.steps[1].summary == "rewrote 0 of 1; skipped 1: its keys are not the tokens of its queries"


def test_measured_keeps_the_mass_and_says_how_much() -> None:
    program, history = sparse(tiny_bert, "sparsify-attention{pattern=measured,block=2,mass=0.6}")
    notes = history.steps[-1].notes
    assert len(notes) == 2
    assert notes[0].startswith("encoder.layer.0.attention.self: ") and "% of blocks kept" in notes[0]
    layouts = [weight for name, weight in program.weights().items() if name.endswith("layout")]
    assert [tuple(layout.shape) for layout in layouts] == [(2, 4, 4), (2, 4, 4)]
    assert all(bool(layout[:, -1].all() and layout[..., -1].all()) for layout in layouts)
    assert all(bool(layout.diagonal(0, 1, 2).all()) for layout in layouts)


def test_measured_at_almost_all_the_mass_changes_nothing() -> None:
    _, history = sparse(tiny_bert, "sparsify-attention{pattern=measured,block=2,mass=0.999999}")
    assert history.steps[-1].relative_error == 0


def test_masses_count_real_queries_once() -> None:
    """Blocks summed in a loop over tokens, for two texts of which the second is padded."""
    generator = torch.Generator().manual_seed(0)
    found = BlockMass(torch.zeros(0, 0, 0), torch.zeros(0, 0))
    total, count = torch.zeros(2, 3, 3), torch.zeros(3, 3)
    for length, size in ((7, 3), (3, 1)):
        real = torch.arange(7) < length
        mass = torch.rand(2, 7, 7, generator=generator) * real
        found.add(mass, real, 3)
        for i in range(length):
            for j in range(length):
                total[:, i // 3, j // 3] += mass[:, i, j]
            count[i // 3, :size] += 1
    torch.testing.assert_close(found.total, total)
    assert torch.equal(found.count, count)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_blocks_keep_the_share_at_every_length(share: float) -> None:
    mean = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) ** 4
    kept = fewest_blocks(mean, share)
    for row in range(6):
        for length in range(row + 1, 7):
            part, held = mean[:, row, :length], kept[:, row, :length]
            assert ((part * held).sum(-1) >= share * part.sum(-1) - 1e-5).all()
    assert kept.diagonal(0, 1, 2).all()


def test_few_blocks_are_kept_where_mass_is_in_few() -> None:
    mean = torch.full((1, 4, 4), 0.01)
    mean[0, :, 0] = 1.0
    kept = fewest_blocks(mean, 0.9)
    assert torch.equal(kept[0], torch.eye(4, dtype=torch.bool) | (torch.arange(4) == 0))


def test_random_blocks_are_others_and_earlier_ones_where_causal() -> None:
    for causal in (False, True):
        layout = random_layout(3, 8, 2, causal=causal, generator=torch.Generator().manual_seed(0))
        assert layout.shape == (3, 9, 9)
        assert not layout.diagonal(0, 1, 2).any() and not layout[:, -1].any()
        wanted = [min(2, row) if causal else 2 for row in range(8)]
        assert layout[:, :8].sum(-1).tolist() == [wanted] * 3
        assert not causal or not layout.triu(1).any()


def test_short_random_blocks_are_drawn_for_first_tokens() -> None:
    """Blocks of one token of up to 8,192: all pairs of them would take 268 MB for each attention."""
    program, history = sparse(tiny_llama, "sparsify-attention{pattern=global-window-random,window=1,block=1,global_tokens=0}")
    layouts = [tensor for name, tensor in program.weights().items() if name.endswith("layout")]
    assert len(layouts) == 2 and all(layout.shape == (4, 2049, 2049) for layout in layouts)
    assert "random blocks are drawn for the first 2,048 tokens; a larger block= reaches further" in str(history)


def test_too_large_random_block_table_is_refused() -> None:
    class Long(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scaled_dot_product_attention(x, x, x)

    program = captures.optimize(Long(), torch.zeros(1, 1, 5000, 1), dynamic=False).program
    wanted = (
        "keeps a table of 1 heads × 5,000 × 5,000 blocks for 5,000 tokens in blocks of 1, more than 16,777,216 bytes; give "
        "block= of 2 or more, or another pattern="
    )
    with pytest.raises(UnsupportedError, match=re.escape(wanted)):
        Pipeline([SparsifyAttention("global-window-random", window=1, block=1)], checks="structural").run(program)


def test_room_is_left_for_longer_texts() -> None:
    assert with_room(torch.zeros(1, 1, 1, dtype=torch.bool)).tolist() == [[[False, True], [True, True]]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stride": 2}, "sparsify-attention{pattern=window} has no use for stride=; its options: window, global_tokens"),
        ({"pattern": "block", "window": 8}, "has no use for window=; its options: block, global_tokens"),
        ({"window": -1}, "sparsify-attention takes window= of 0 or more, not -1"),
        ({"pattern": "block", "block": 0}, "sparsify-attention takes block= of 1 or more, not 0"),
        ({"pattern": "measured", "mass": 1.0}, "sparsify-attention takes mass= of a fraction above 0 and below 1, not 1"),
    ],
)
def test_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        SparsifyAttention(**options)  # pyright: ignore[reportArgumentType]
    assert message in str(refusal.value)


def test_requirements() -> None:
    with pytest.raises(RequirementError) as refusal:
        rewrite(SparsifyAttention(pattern="measured"), Calls(attend), normal(1, 2, 7, 4))
    assert "needs calibration data: pass data=, or choose another pattern=" in str(refusal.value)


def test_text_and_object_are_inverse() -> None:
    text = "sparsify-attention{pattern=strided,window=8,stride=4}"
    (found,) = parse_pipeline(text, PASSES)
    assert format_pass(found) == text


@every_backend
@pytest.mark.parametrize(
    "options", all_but_slow(["{window=2}", "{pattern=global-window-random,window=1,block=2,random_blocks=1}"], "{window=2}")
)
def test_composes(options: str, backend: Backend) -> None:
    case = tiny_llama()
    passes = f"sparsify-attention{options}"
    fast = captures.compile(case.model, case.inputs, passes=passes, backend=backend, goal=None)
    wanted = captures.optimize(case.model, case.inputs, passes=passes).program(**case.kwargs)
    # Two float32 backends.
    torch.testing.assert_close(fast(**case.kwargs)[0], wanted[0], rtol=1e-4, atol=1e-5)
