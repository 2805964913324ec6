"""Tests of groups and of their options as pipeline text."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.frontends.generation.decoder import capture_decoder
from lissom.tuning.sites import (
    BLOCKS,
    BLOCKS_IN_INT8,
    CACHE,
    EXPERTS,
    LOW_RANK,
    NO_LINEARS,
    PATTERN,
    PLAIN,
    SCHEMES,
    TABLE,
    Group,
    Option,
    groups_for,
    groups_of,
    linear_paths,
)
from lissom.tuning.spelling import pipeline_of, read_options
from tests.support.decoders import decoder
from tests.support.mixtures import program_of, samples
from tests.support.models import captured, tied_llama, tiny_bert, tiny_llama


@pytest.fixture(scope="module")
def program():
    case = tiny_bert()
    return lissom.optimize(case.model, case.inputs, checks="off").program


def test_the_groups_of_a_bert(program):
    groups = groups_of(program)
    assert [group.kind for group in groups[:4]] == ["attention", "attention", "feed-forward", "feed-forward"]
    attention, forward = groups[0], groups[2]
    assert (attention.size, attention.layer, len(attention.linears)) == (2, "encoder.layer.0", 4)
    assert (forward.size, forward.layer, len(forward.linears)) == (24, "encoder.layer.0", 2)
    assert groups[0].likeness == groups[1].likeness != groups[2].likeness
    assert forward.lefts() == [24, 18, 12, 6, 3, 0]
    held = [path for group in groups for path in group.linears]
    assert len(held) == len(set(held))


def test_groups_for_a_server_have_schemes_of_its_checkpoints(program):
    """One for all layers of an attention and of a feed-forward, without zero points, and nothing is removed."""
    groups, linears = groups_for("vllm", groups_of(program)), linear_paths(program)
    assert [(group.kind, len(group.linears)) for group in groups] == [("attention", 4)] * 2 + [("feed-forward", 2)] * 2
    assert {option.left for group in groups for option in group.options(SCHEMES)} == {1}
    assert set(groups[0].schemes) <= {PLAIN, "int8-dynamic", "int8-weight", "int4-weight"}
    options = [Option(1, scheme) for scheme in ("int8-dynamic", "int8-weight", "int8-weight", PLAIN)]
    text = pipeline_of(groups, options, linears)
    assert text.startswith("quantize{symmetric=true,schemes=")
    assert read_options(groups, text) == options


def quantized(groups):
    """int8 for all linear layers, nothing for other groups."""
    return [group.whole if group.kind in NO_LINEARS else Option(group.size, "int8-dynamic") for group in groups]


def test_every_path_of_group_is_one_that_quantize_takes(program):
    known = set(linear_paths(program))
    layers = [group for group in groups_of(program) if group.kind not in NO_LINEARS]
    assert {path for group in layers for path in group.linears} <= known


def test_tables_and_patterns_are_read_back_from_their_text(program):
    groups, linears = groups_of(program), linear_paths(program)
    tables = [group for group in groups if group.kind == TABLE]
    patterns = [group for group in groups if group.kind == PATTERN]
    assert [group.name for group in tables][-3:] == [
        f"embeddings.{name}_embeddings" for name in ("word", "token_type", "position")
    ]
    assert [group.name for group in patterns] == [f"encoder.layer.{index}.attention.self" for index in range(2)]
    chosen = {(TABLE, "embeddings.word_embeddings"): Option(1, "int8-weight"), (PATTERN, patterns[1].name): Option(1, "window")}
    options = [chosen.get((group.kind, group.name), group.whole) for group in groups]
    text = pipeline_of(groups, options, linears, packed=True)
    assert text == (
        'sparsify-attention{patterns="*=none,encoder.layer.1.attention.self=window"},'
        "quantize{scheme=int8-weight,embeddings=true,only=embeddings.word_embeddings},zero-padding,pack-tokens"
    )
    assert read_options(groups, text) == options
    lissom.optimize(program, tiny_bert().inputs, passes=text, checks="structural")


def test_int4_of_linear_layers_leaves_tied_table_alone():
    groups = [
        Group("up", "linear", linears=["up"], schemes=("none", "int4-weight")),
        Group("head", TABLE, linears=["head"], schemes=("none", "int8-weight"), option="embeddings", tied=True),
    ]
    text = pipeline_of(groups, [Option(1, "int4-weight"), Option(1)], ["up"])
    assert text == "quantize{scheme=int4-weight,embeddings=false},gptq"
    assert read_options(groups, text) == [Option(1, "int4-weight"), Option(1)]


def test_four_bits_are_fitted_unless_time_alone_counts():
    groups = [
        Group("up", "linear", linears=["up"], schemes=("none", "int8-dynamic")),
        Group("head", TABLE, linears=["table", "head"], schemes=("none", "int4-dynamic"), option="embeddings", tied=True),
    ]
    options = [Option(1, "int8-dynamic"), Option(1, "int4-dynamic")]
    table = 'quantize{scheme=int4-dynamic,embeddings=true,only="table,head"}'
    quantized = f"quantize{{embeddings=false}},{table}"
    assert pipeline_of(groups, options, ["up"]) == f'{quantized},gptq{{only="table,head"}}'
    text = pipeline_of(groups, options, ["up"], bf16=True)
    assert text == f'cast,sink-casts,fold-casts,{quantized},gptq{{only="table,head"}}'
    assert read_options(groups, text) == options
    assert pipeline_of(groups, options, ["up"], fitted=False) == quantized


def test_separate_lm_head_leaves_its_table_in_int8():
    group = Group(
        "head", TABLE, linears=["table", "head"], schemes=("none", "untied-int4-dynamic"), option="embeddings", tied=True
    )
    text = pipeline_of([group], [Option(1, "untied-int4-dynamic")], [], bf16=True)
    assert text == (
        "untie-lm-head,cast,sink-casts,fold-casts,"
        'quantize{scheme=int8-weight,embeddings=true,only="table,head"},'
        'quantize{scheme=int4-dynamic,lm_head=true,only="table,head"},gptq'
    )
    assert read_options([group], text) == [Option(1, "untied-int4-dynamic")]


def test_nothing_chosen_is_the_exact_pipeline(program):
    groups = groups_of(program)
    assert pipeline_of(groups, [group.whole for group in groups], linear_paths(program), steps=9) == "exact"


def test_options_are_read_back_from_their_text(program):
    groups, linears = groups_of(program)[:4], linear_paths(program)
    options = [Option(1, "int8-dynamic"), Option(0), Option(12), Option(24, "int8-weight")]
    text = pipeline_of(groups, options, linears, steps=5)
    assert text.index("prune-layers") < text.index("prune-heads") < text.index("prune-neurons")
    assert text.index("prune-neurons") < text.index("distill{steps=5,precision=fp32}") < text.index("quantize")
    assert read_options(groups, text) == options
    lissom.optimize(program, tiny_bert().inputs, passes=pipeline_of(groups, options, linears), checks="structural")


def test_one_scheme_everywhere_needs_no_paths(program):
    groups, linears = groups_of(program), linear_paths(program)
    assert pipeline_of(groups, quantized(groups), linears) == "quantize"
    text = pipeline_of(groups, quantized(groups), linears, steps=3)
    assert text == "quantize,distill{steps=3,precision=fp32}"


def test_bfloat16_precedes_quantizers_and_nothing_is_distilled_after(program):
    groups, linears = groups_of(program), linear_paths(program)
    options = quantized(groups)
    assert pipeline_of(groups, options, linears, steps=3, bf16=True) == "cast,sink-casts,fold-casts,quantize"


def test_factors_are_read_back():
    group = Group("layer", "feed-forward", 8, ["layer"], linears=["layer.up", "layer.down"], schemes=("none", LOW_RANK))
    text = pipeline_of([group], [Option(8, LOW_RANK)], group.linears)
    assert text == 'low-rank{amounts="layer.up=0.5,layer.down=0.5"}'
    assert read_options([group], text) == [Option(8, LOW_RANK)]


def test_blocks_are_read_back():
    names = ["attention", "forward", "other"]
    groups = [Group(name, "linear", linears=[f"{name}.up"], schemes=("none", BLOCKS, BLOCKS_IN_INT8)) for name in names]
    options, linears = [Option(1, BLOCKS), Option(1, BLOCKS_IN_INT8), Option(1)], [f"{name}.up" for name in names]
    text = pipeline_of(groups, options, linears)
    assert text == (
        'sparsify{pattern=block,criterion=sparsegpt,amounts="attention.up=0.4,forward.up=0.4"},'
        'quantize{schemes="*=none,forward=int8-dynamic"}'
    )
    assert read_options(groups, text) == options
    assert "sparsegpt" not in pipeline_of(groups, options, linears, fitted=False)


def test_key_value_heads_are_pooled_only_with_all_heads():
    case = tiny_llama()
    program = lissom.optimize(case.model, case.inputs, checks="off").program
    groups, linears = groups_of(program), linear_paths(program)
    attention = groups[0]
    assert (attention.size, attention.key_value_heads, attention.pools) == (2, 2, (1,))
    found = attention.options(["none", "int8-dynamic"])
    assert [option for option in found if option.pooled] == [Option(2, "none", 1), Option(2, "int8-dynamic", 1)]
    options = [found[-1], *(group.whole for group in groups[1:])]
    text = pipeline_of(groups, options, linears)
    assert text.startswith(f'pool-heads{{amounts="{attention.units[0]}=1"}},merge-equal-heads,quantize')
    assert read_options(groups, text) == options
    found = lissom.optimize(program, case.inputs, passes=text, checks="structural").program
    assert found.parameter_count < program.parameter_count


def test_a_model_without_sites_has_linear_layers_alone():
    assert {group.kind for group in groups_of(captured("tied"))} <= {"linear", TABLE}


def test_int4_of_other_layers_leaves_tied_table_alone():
    inputs = {"input_ids": torch.randint(0, 64, (1, 8))}
    program = lissom.optimize(tied_llama(), inputs).program
    groups, linears = groups_of(program), linear_paths(program)
    table = next(group for group in groups if group.kind == TABLE)
    assert table.tied and table.option == "embeddings" and "untied-int4-dynamic" in table.schemes
    options = [
        Option(item.size, "int4-weight") if "int4-weight" in item.schemes and item is not table else item.whole
        for item in groups
    ]
    text = pipeline_of(groups, options, linears)
    passes = f"{text},fold-quantized-weights"
    found = lissom.optimize(program, inputs, passes=passes, data=[inputs], checks="structural").program
    assert "lm_head.weight" in found.weights()  # and not lm_head.weight_int8
    assert read_options(groups, text) == options


def test_experts_of_mixtures_have_amounts():
    program = program_of("qwen3-moe")
    groups, linears = groups_of(program), linear_paths(program)
    experts = [group for group in groups if group.kind == EXPERTS]
    assert experts and all(group.lefts()[0] == group.size and min(group.lefts()) >= group.least for group in experts)
    fewest = min(experts[0].lefts())
    options = [Option(fewest) if group is experts[0] else group.whole for group in groups]
    text = pipeline_of(groups, options, linears)
    assert text == f'prune-experts{{amounts="{experts[0].name}={fewest}"}}'
    assert read_options(groups, text) == options
    found = lissom.optimize(program, samples()[0], passes=text, data=samples(), checks="structural").program
    assert found.parameter_count < program.parameter_count


def test_kv_cache_is_one_group():
    captured = capture_decoder(decoder("qwen3"), max_length=16)
    groups, linears = groups_of(captured.program), linear_paths(captured.program)
    assert [group.schemes for group in groups if group.kind == CACHE] == [("none", "cache-int8", "cache-int4")]
    for scheme, wanted in {"cache-int8": "quantize-cache", "cache-int4": "rotate,quantize-cache{bits=4}"}.items():
        options = [Option(1, scheme) if group.kind == CACHE else group.whole for group in groups]
        text = pipeline_of(groups, options, linears)
        assert text == wanted
        assert read_options(groups, text) == options
