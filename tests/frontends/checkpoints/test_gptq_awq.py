"""Tests of lissom.frontends.checkpoints.gptq_awq: the integers of GPTQ and AWQ, packed here by a loop over their definition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lissom
from lissom.frontends.checkpoints.packed_integers import awq_integers, gptq_zero_points
from lissom.frontends.checkpoints.stored_weights import PackedWeight, stored_form
from lissom.frontends.models.huggingface import load
from lissom.ops.formats import FORMATS, unpack_halves
from lissom.ops.native import missing_weight_quantized_kernel
from lissom.ops.weight_quantized_linear import weight_quantized_linear
from tests.support.neighbours import all_but_slow
from tests.support.quantized_checkpoints import (
    Integers,
    Written,
    change_config,
    change_tensors,
    gptq_parts,
    neighbours,
    rounded,
    small_config,
    write,
)
from tests.support.quantized_checkpoints import (
    words as words_of,
)

aten = torch.ops.aten
IDS = torch.arange(3, 15)[None]


def by_activation(columns: int, group: int) -> np.ndarray:
    """Groups of inputs that are not neighbours, as desc_act makes them; the same for all layers of so many inputs."""
    return np.random.default_rng(columns).permutation(np.arange(columns) // group)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {}),
    "gptq zero points": ("gptq", {"symmetric": False, "group": 16}),
    "gptq v2": ("gptq", {"symmetric": False, "checkpoint_format": "gptq_v2"}),
    "gptq whole rows": ("gptq", {"group": -1}),
    "gptq 8 bits": ("gptq", {"bits": 8}),
    "gptq 8 bits, zero points": ("gptq", {"bits": 8, "symmetric": False, "group": -1}),
    "gptq desc_act": ("gptq", {"symmetric": False, "scattered": by_activation}),
    "gptq odd sizes": ("gptq", {"config": {"hidden": 40, "feed": 72}, "group": 8}),
    "gptq qwen3, tied": ("gptq", {"config": {"kind": "qwen3", "tied": True}}),
    "awq": ("awq", {"symmetric": False}),
    "awq whole rows": ("awq", {"symmetric": False, "group": -1}),
    "awq qwen3": ("awq", {"symmetric": False, "group": 16, "config": {"kind": "qwen3"}}),
}


def written(folder: Path, name: str) -> Written:
    method, options = CASES[name]
    config = small_config(**options.get("config", {}))
    return write(folder, method, **{**options, "config": config})


def check_integers(program: Any, layer: str, wanted: Integers, bits: int) -> None:
    """The program has the integers, scales and zero points of the file, in the order of their groups."""
    order, middle = np.argsort(wanted.group_of, kind="stable"), 1 << (bits - 1)
    signed = bool((wanted.zero_point == middle).all())
    form = FORMATS[f"{'' if signed else 'u'}int{bits}"]
    q = program.weight(f"{layer}.weight_{form.name}")
    q = unpack_halves(q, form) if bits == 4 else q
    assert np.array_equal(q.numpy().astype(np.int64) + (middle if signed else 0), wanted.q[:, order])
    assert np.array_equal(program.weight(f"{layer}.weight_scale").numpy(), wanted.scale)
    if not signed:
        assert np.array_equal(program.weight(f"{layer}.weight_zero_point").numpy(), wanted.zero_point)


@pytest.mark.parametrize("name", CASES)
def test_stored_integers_are_in_the_program(tmp_path: Path, name: str) -> None:
    made = written(tmp_path, name)
    checkpoint = load(str(tmp_path))
    found = lissom.optimize(checkpoint.model, {"input_ids": IDS, "use_cache": False}, passes="use-stored-weights")
    for layer, wanted in made.layers.items():
        check_integers(found.program, layer, wanted, CASES[name][1].get("bits", 4))
    # The float weights are (q - zero_point) · scale rounded once, as those of the oracle are, so the logits are the same bits.
    with torch.no_grad():
        wanted_logits = made.model(IDS, use_cache=False).logits
        assert torch.equal(checkpoint.model(IDS, use_cache=False).logits, wanted_logits)
    # Sums of float32 in another order: 24 bits, logits up to 8.
    torch.testing.assert_close(found.program(input_ids=IDS, use_cache=False)[0], wanted_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    all_but_slow(
        ["gptq", "gptq desc_act", "gptq odd sizes", "gptq 8 bits, zero points", "gptq qwen3, tied", "awq"],
        *("gptq", "gptq 8 bits, zero points", "gptq qwen3, tied", "awq"),
    ),
)
def test_decoder_runs_stored_integers(tmp_path: Path, name: str) -> None:
    made = written(tmp_path, name)
    decoder = lissom.compile_generation(tmp_path, max_length=32, goal=None)
    if missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) is None:
        kernels = decoder.program.nodes(weight_quantized_linear)
        packed = {"int4", "uint4"} if "8 bits" not in name else {"uint8", "int8"}
        assert len(kernels) >= 8 and {kernel.kwargs["format"] for kernel in kernels} <= packed
    with torch.no_grad():
        wanted = made.model(IDS, use_cache=False).logits[:, -1]
    # The kernels sum the products of a group before they scale them, in float32.
    torch.testing.assert_close(decoder.step(IDS), wanted, rtol=1e-4, atol=1e-4)
    decoder.reset()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(decoder.generate(IDS, **options), made.model.generate(IDS, **options))


def test_layers_that_read_the_same_order_sort_their_input_once(tmp_path: Path) -> None:
    written(tmp_path, "gptq desc_act")
    model = load(str(tmp_path), with_inputs=False).model
    program = lissom.optimize(model, {"input_ids": IDS, "use_cache": False}, passes="use-stored-weights").program
    # In each of two layers: queries, keys and values; the output; gate and up; down.
    assert len(program.nodes(aten.index_select.default)) == 8
    orders = {str(node.args[2].target) for node in program.nodes(aten.index_select.default)}  # pyright: ignore
    assert len(orders) == 2


def test_groups_of_different_sizes_stay_in_floating_point(tmp_path: Path) -> None:
    def uneven(columns: int, group: int) -> np.ndarray:
        groups = np.arange(columns) // group
        groups[0] = 1
        return groups

    made = write(tmp_path, "gptq", scattered=uneven)
    checkpoint = load(str(tmp_path))
    assert checkpoint.notes[0] == (
        "14 layers, 'model.layers.0.mlp.down_proj' first, are in floating point: their g_idx has groups of different sizes, "
        "which no kernel reads"
    )
    with torch.no_grad():
        found, wanted = (model(IDS, use_cache=False).logits for model in (checkpoint.model, made.model))
    assert torch.equal(found, wanted)


def test_notes_count_the_stored_weights(tmp_path: Path) -> None:
    written(tmp_path, "gptq zero points")
    checkpoint = load(str(tmp_path))
    assert checkpoint.notes[0] == (
        "the file stores 14 weights quantized (14 in uint4 in groups of 16); use-stored-weights reads them as they are"
    )
    assert not hasattr(checkpoint.model.config, "quantization_config")


def test_rules_of_single_layers(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: bits and groups of a layer follow from its shapes."""
    written(tmp_path, "gptq")
    layer = "model.layers.0.mlp.up_proj"
    stored = rounded(np.random.default_rng(0).normal(size=(96, 64)), 8, neighbours(64, 16), symmetric=False)
    change_tensors(tmp_path, **{f"{layer}.{leaf}".replace(".", "__"): part for leaf, part in gptq_parts(stored, 8).items()})
    change_config(tmp_path, dynamic={r"+:.*\.0\.mlp\.up_proj": {"bits": 8, "group_size": 16}})
    weight = load(str(tmp_path), with_inputs=False).model.get_parameter(f"{layer}.weight")
    form = stored_form(weight)
    assert isinstance(form, PackedWeight) and form.name == "uint8 in groups of 16"
    assert torch.equal(weight.detach(), torch.from_numpy(stored.values()).float())


def test_older_file_of_autogptq(tmp_path: Path) -> None:
    written(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    older = config.pop("quantization_config")
    older.pop("quant_method")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(older))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert "14 in int4 in groups of 32" in load(str(tmp_path), with_inputs=False).notes[0]


def test_awq_as_the_converter_of_compressed_tensors_reads_it() -> None:
    """Another reader of the same words than ours, by another author."""
    reason = "another reader of AWQ"
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq", reason=reason)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (64, 12), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    theirs = autoawq.AutoAWQConverter
    q, zeros = theirs.reverse_awq_order(*theirs.unpack_awq(words, words[:2], 4), 4)
    assert torch.equal(awq_integers(words), (q & 15).T.to(torch.uint8))
    assert torch.equal(awq_integers(words[:2]), (zeros & 15).T.to(torch.uint8))


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_gptq_are_one_more(bits: int) -> None:
    """GPTQModel writes `gptq` by subtracting one from each place of a word, and a place of 0 borrows from the next."""
    zero_point = torch.from_numpy(np.random.default_rng(0).integers(0, 1 << bits, (96, 3)))
    newer = words_of(zero_point.numpy().T, bits)
    older = newer - sum(1 << place for place in range(0, 32, bits))
    assert torch.equal(gptq_zero_points(older, bits, less_one=True), zero_point.to(torch.uint8))
    assert torch.equal(gptq_zero_points(newer, bits, less_one=False), zero_point.to(torch.uint8))
    # From 1 on, each place is one less, as AutoGPTQ wrote them.
    least = zero_point.clamp_min(1)
    assert torch.equal(gptq_zero_points(words_of(least.numpy().T - 1, bits), bits, less_one=True), least.to(torch.uint8))
