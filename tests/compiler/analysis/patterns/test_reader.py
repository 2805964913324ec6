"""Patterns read from masks: each against the mask that the graph computes, in small functions and in transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import fx
from torch.nn.functional import scaled_dot_product_attention

from lissom.compiler.analysis.patterns.reader import CAUSAL, Reading, read_pattern, write_rest
from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.analysis.structure.operands import mask_of
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.ir.program import Program
from lissom.ops.pattern import Condition
from tests.support import captures
from tests.support.harness import Calls, rewrite
from tests.support.models import VOCABULARY, Case, normal, seeded, tokens
from tests.support.neighbours import all_but_slow

LENGTH = 37
BAND = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().triu(-5)
BLOCKS = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.5
COARSE = torch.eye(3, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(16, 1)[:LENGTH, :LENGTH]


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]


def _looked_up(table: torch.Tensor) -> torch.Tensor:
    i, j = ((item // 8).clamp(max=4) for item in positions())
    return table[:, i, j]


MASKS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "causal": lambda i, j: j <= i,
    "strictly before": lambda i, j: j < i,
    "a window": lambda i, j: (i - j).abs() <= 4,
    "a causal window": lambda i, j: (j <= i) & (j > i - 5),
    "not a window": lambda i, j: ~((i - j).abs() <= 4),
    "one of two": lambda i, j: (j < 3) | (i < 3) | (abs(i - j) < 2),
    "blocks": lambda i, j: i // 8 == j // 8,
    "blocks in a row": lambda i, j: (i // 4 - j // 4).abs() <= 1,
    "strides of tokens": lambda i, j: (i - j) % 5 == 0,
    "strides behind an offset": lambda i, j: (i - j + 3) % 5 <= 2,
    "equal remainders": lambda i, j: i % 4 == j % 4,
    "fixed columns": lambda i, j: (j % 6 >= 4) & (j <= i),
    "distances to one side, rounded": lambda i, j: (i - j) // 4 == 1,
    "scaled": lambda i, j: 2 * i - 2 * j <= 7,
    "clamped": lambda i, j: (i - j).clamp(min=0, max=9) < 9,
    "shifted views": lambda i, j: (i.transpose(0, 1).unsqueeze(-1) >= j.unsqueeze(0)).squeeze(0),
    "a slice": lambda i, j: torch.arange(50)[None, 3 : 3 + LENGTH] - 3 <= i,
    "triangles": lambda i, j: torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2).triu(-3),
    "a triangle of one row": lambda i, j: torch.ones(1, LENGTH, dtype=torch.bool).tril(5).expand(LENGTH, LENGTH) & (j <= i),
    "other than": lambda i, j: (i != j) & (j <= i),
    "always": lambda i, j: (i >= 0) & (j <= i),
}
CONSTANTS = {"a band": BAND, "a band upside down": ~BAND, "causal": BAND | BAND.tril(), "blocks": COARSE, "columns": BAND[5:6]}


def read(
    mask: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], fold: bool = False, **weights: torch.Tensor
) -> Program:
    def attend(self: object, q: torch.Tensor) -> torch.Tensor:
        table = getattr(self, "table", q)
        return scaled_dot_product_attention(q, q, q, attn_mask=mask(*positions(), table))

    module = Calls(attend, table=weights.get("table", torch.ones(1, dtype=torch.bool)))
    return rewrite("fold-constants" if fold else "remove-no-ops", module, normal(2, 2, LENGTH, 4), dynamic=False)[0]


def attention_of(program: Program) -> fx.Node:
    return next(node for node in program.nodes() if is_attention(node))


def found_mask(reading: Reading, queries: int = LENGTH) -> torch.Tensor:
    assert reading.pattern is not None, reading.reason
    return reading.pattern.mask(queries, queries, reading.layout)


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_positions_is_read_exactly(name: str) -> None:
    program = read(lambda i, j, _: MASKS[name](i, j))
    attention = attention_of(program)
    reading = read_pattern(program, attention)
    assert not reading.rest
    wanted = MASKS[name](*positions()).expand(1, LENGTH, LENGTH)
    assert torch.equal(found_mask(reading), wanted)
    mask = mask_of(attention)
    assert mask is not None
    assert torch.equal(evaluate_nodes(program.graph_module, mask).expand(1, LENGTH, LENGTH), wanted)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_mask_is_read_exactly(name: str) -> None:
    table = CONSTANTS[name]
    program = read(lambda i, j, held: held, fold=True, table=table)
    reading = read_pattern(program, attention_of(program))
    assert not reading.rest
    assert torch.equal(found_mask(reading), table.expand(1, LENGTH, LENGTH))


def test_blocks_of_each_head_in_constant_mask_are_read() -> None:
    blocks = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(1)) > 0.5
    table = blocks.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :LENGTH, :LENGTH].tril()
    program = read(lambda i, j, held: held & (j <= i), fold=True, table=table)
    assert torch.equal(found_mask(read_pattern(program, attention_of(program))), table)


def test_a_layout_looked_up_by_blocks_is_read() -> None:
    program = read(lambda i, j, held: _looked_up(held) & (j <= i), table=BLOCKS)
    reading = read_pattern(program, attention_of(program))
    assert reading.layout is not None and torch.equal(reading.layout, BLOCKS)
    i, j = positions()
    assert torch.equal(found_mask(reading), _looked_up(BLOCKS) & (j <= i))


NUMBERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "chosen": lambda seen: torch.where(seen, 0.0, -torch.inf),
    "chosen the other way round": lambda seen: torch.where(~seen, torch.finfo(torch.float32).min, 0.0),
    "filled": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    "added": lambda seen: torch.where(seen, 0.0, -1e9) + torch.zeros(seen.shape).masked_fill(~seen, -3e38),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_hide_are_read(name: str) -> None:
    program = read(lambda i, j, _: NUMBERS[name]((j <= i) & (i - j < 6)))
    reading = read_pattern(program, attention_of(program))
    assert not reading.rest and reading.pattern is not None
    assert reading.pattern.alternatives == ((Condition(1, -1, 0, 5),),)


def masked(mask: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Program:
    """An attention whose mask reads a second input, [batch, tokens]."""

    def attend(q: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
        return scaled_dot_product_attention(q, q, q, attn_mask=mask(i, j, seen))

    inputs = normal(2, 2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    return rewrite("remove-no-ops", Calls(attend), *inputs, dynamic=False)[0]


def test_padding_stays_beside_the_pattern() -> None:
    def mask(i: torch.Tensor, j: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return ~(~((j <= i) & seen[:, None, :].expand(-1, 9, -1)) | ((i - j).abs() > 3))[:, None]

    program = masked(mask)
    attention = attention_of(program)
    reading = read_pattern(program, attention)
    assert reading.pattern is not None and reading.pattern.alternatives == ((Condition(1, -1, 0, 3),),)
    with (edit := Editor(program, "test")).before(attention):
        rest = write_rest(edit, reading.rest)
    assert rest is not None
    assert str(rest.meta["val"].shape) == "torch.Size([2, 1, 1, 9])"


@pytest.mark.parametrize(
    "mask, reason",
    [
        (lambda i, j, seen: ((j <= i) | seen[:, None, :])[:, None], "its mask depends on 'y', which is data"),
        (
            lambda i, j, seen: torch.where((j <= i) & seen[:, None, None, :], 0.0, -1e9),
            "its mask has finite mask values: a fully masked row is a mean over all keys, and padding may cause one",
        ),
        (
            lambda i, j, seen: torch.where(j <= i, 0.0, -1e9) + torch.where(seen, 0.0, -1e9)[:, None, None, :],
            "its mask has finite mask values: a fully masked row is a mean over all keys, and padding may cause one",
        ),
        (
            lambda i, j, seen: torch.where(j < i, 0.0, -1e9)[None, None],
            "its mask has finite mask values, and may mask all keys of a row",
        ),
        (lambda i, j, seen: seen[:, None, None, :], None),
    ],
    ids=["or data", "one number for both", "padding in numbers", "rows that see nothing", "padding alone"],
)
def test_what_is_no_pattern_has_its_reason(mask: Callable[..., torch.Tensor], reason: str | None) -> None:
    program = masked(mask)
    reading = read_pattern(program, attention_of(program))
    assert reading.pattern is None
    assert reading.reason == reason


SIZES: dict[str, object] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention"]
WINDOWS = {
    "mistral": (lambda: transformers.MistralModel(transformers.MistralConfig(**SIZES, sliding_window=4)), [4, 4]),
    "gemma2": (
        lambda: transformers.Gemma2Model(transformers.Gemma2Config(**SIZES, head_dim=4, sliding_window=4, layer_types=SLIDING)),
        [4, None],
    ),
    "gemma3": (
        lambda: transformers.Gemma3TextModel(
            transformers.Gemma3TextConfig(**SIZES, head_dim=4, sliding_window=4, layer_types=SLIDING)
        ),
        [4, None],
    ),
    "gpt-neo": (
        lambda: transformers.GPTNeoModel(
            transformers.GPTNeoConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=4, attention_types=[[["local", "global"], 1]],
                window_size=4, max_position_embeddings=64,
            )
        ),
        [4, None],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", all_but_slow(WINDOWS, "gemma2", "mistral"))
def test_windows_that_models_come_with_are_read(name: str) -> None:
    build, windows = WINDOWS[name]
    case = Case(seeded(build), {"input_ids": tokens(2, 11), "use_cache": False})
    program = captures.optimize(case.model, case.inputs).program
    found = [read_pattern(program, node) for node in program.nodes() if is_attention(node)]
    wanted = [((CAUSAL if window is None else Condition(1, -1, 0, window - 1),),) for window in windows]
    assert [reading.pattern and reading.pattern.alternatives for reading in found] == wanted
    assert not any(reading.rest for reading in found)


@pytest.mark.slow
def test_chunks_of_llama_4_are_read() -> None:
    config = transformers.Llama4TextConfig(
        **SIZES, head_dim=4, attention_chunk_size=4, intermediate_size_mlp=24, num_local_experts=2
    )  # fmt: skip
    model = seeded(lambda: transformers.Llama4TextModel(config))
    program = captures.optimize(model, {"input_ids": tokens(2, 11), "use_cache": False}).program
    reading = read_pattern(program, attention_of(program))
    assert reading.pattern is not None
    assert reading.pattern.alternatives == ((CAUSAL, Condition(1, -1, 0, 0, 4)),)


def test_a_local_encoder_keeps_its_padding() -> None:
    config = transformers.ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        local_attention=6, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 7:] = 0
    model = seeded(lambda: transformers.ModernBertModel(config))
    program = captures.optimize(model, {"input_ids": tokens(2, 11), "attention_mask": mask}).program
    first, second = (read_pattern(program, node) for node in program.nodes() if is_attention(node))
    assert (first.pattern, first.reason) == (None, None)
    assert second.pattern is not None and second.pattern.alternatives == ((Condition(1, -1, -3, 3),),)
    assert len(second.rest) == 1
