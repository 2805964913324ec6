"""Tests of lissom.frontends.checkpoints.quantized: quantized checkpoints that are damaged, hostile, or of another format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lissom
from lissom.errors import ArtifactError, LissomError, UnsupportedError
from lissom.frontends.checkpoints.quantized import quantization_config
from lissom.frontends.checkpoints.stored_weights import stored_form
from lissom.frontends.models.huggingface import load
from tests.support.quantized_checkpoints import (
    Written,
    change_config,
    change_tensors,
    small_config,
    words,
    write,
)

LAYER = "model.layers.0.mlp.up_proj"
"""Of 96 outputs and 64 inputs."""


def damage(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Replaces tensors of the layer."""
    names = {f"{LAYER}.{leaf}".replace(".", "__"): tensor for leaf, tensor in changes.items()}
    return lambda folder: change_tensors(folder, **names)


def ask(**fields: Any) -> Callable[[Path], None]:
    """Changes fields of the quantization configuration."""
    return lambda folder: change_config(folder, **fields)


INTS = {"dtype": torch.int32}
WRONG: dict[str, tuple[str, Callable[[Path], None], type[LissomError], str]] = {
    "bits of 3": ("gptq", ask(bits=3), UnsupportedError, "the number of bits of GPTQ (bits) is 3, and Lissom reads 4 or 8;"),
    "bits of a text": ("gptq", ask(bits="4"), UnsupportedError, "(bits) is '4', and Lissom reads 4 or 8;"),
    "no bits": ("gptq", ask(bits=None), UnsupportedError, "(bits) is None, and Lissom reads 4 or 8; quantize the model again"),
    "bits of AWQ": ("awq", ask(bits=8), UnsupportedError, "the number of bits of AWQ (bits) is 8, and Lissom reads 4;"),
    "format of tomorrow": (
        "gptq",
        ask(checkpoint_format="gptq_v3"),
        UnsupportedError,
        "the layout of GPTQ (checkpoint_format) is 'gptq_v3', and Lissom reads gptq or gptq_v2; quantize the model again",
    ),
    "version of AWQ": (
        "awq",
        ask(version="GEMV"),
        UnsupportedError,
        "the layout of AWQ (version) is 'gemv', and Lissom reads gemm;",
    ),
    "group of a text": (
        "gptq",
        ask(group_size="all"),
        UnsupportedError,
        "the group size (group_size) is 'all', and Lissom reads a number of inputs, or -1 for all of a layer;",
    ),
    "huge group": (
        "gptq",
        ask(group_size=1 << 80),
        UnsupportedError,
        "the group size (group_size) is 1208925819614629174706176",
    ),
    "partial group": (
        "gptq",
        ask(group_size=40),
        UnsupportedError,
        "'model.layers.0.mlp.down_proj' has 96 inputs in groups of 40, so its last group is partial, and Lissom reads whole "
        "groups; quantize the model again with a group size that divides 96",
    ),
    "other groups": (
        "gptq",
        ask(group_size=16),
        ArtifactError,
        "has 3 scales for each output of 'model.layers.0.mlp.down_proj', and 96 inputs in groups of 16 need 6; copy",
    ),
    "no scales": (
        "gptq",
        damage(scales=None),
        ArtifactError,
        f"lacks '{LAYER}.scales', which its quantized weight needs; copy",
    ),
    "no zero points": ("awq", damage(qzeros=None), ArtifactError, f"lacks '{LAYER}.qzeros', which its quantized weight needs"),
    "no integers": ("gptq", damage(qweight=None), ArtifactError, f"has '{LAYER}.g_idx' without its qweight; copy"),
    "integers of another shape": (
        "gptq",
        damage(qweight=torch.zeros(8, 95, **INTS)),
        ArtifactError,
        f"has '{LAYER}.qweight' in the shape [8, 95], and a weight of 96 outputs, 64 inputs and 4 bits in groups of 32 needs "
        "[8, 96]; copy the checkpoint again",
    ),
    "integers that are no matrix": (
        "awq",
        damage(qweight=torch.zeros(8, **INTS)),
        ArtifactError,
        "in the shape [8], and packed",
    ),
    "scales that are no matrix": ("gptq", damage(scales=torch.zeros(8)), ArtifactError, "'{LAYER}.scales' in [8], and it is a"),
    "zero points of another shape": ("gptq", damage(qzeros=torch.zeros(2, 11, **INTS)), ArtifactError, "needs [2, 12]; copy"),
    "integers in bytes": (
        "gptq",
        damage(qweight=torch.zeros(8, 96, dtype=torch.int8)),
        ArtifactError,
        f"stores '{LAYER}.qweight' as I8, and a weight of 96 outputs, 64 inputs and 4 bits in groups of 32 is read from I32;",
    ),
    "scales in integers": ("gptq", damage(scales=torch.zeros(2, 96, **INTS)), ArtifactError, "is read from F16, BF16, F32;"),
    "scales not finite": (
        "gptq",
        damage(scales=torch.full((2, 96), torch.inf)),
        ArtifactError,
        f"has scales in '{LAYER}.scales' that are not finite; copy or quantize the model again",
    ),
    "a table of another shape": (
        "gptq",
        lambda folder: change_tensors(folder, model__embed_tokens__weight=torch.zeros(80, 32)),
        ArtifactError,
        "has 'model.embed_tokens.weight' in the shape [80, 32], and its configuration says [80, 64]",
    ),
    "groups that do not exist": (
        "gptq",
        damage(g_idx=torch.full((64,), 7, **INTS)),
        ArtifactError,
        f"names the groups 7 to 7 in '{LAYER}.g_idx', and there are 2, from 0; copy the checkpoint again",
    ),
    "short order": ("gptq", damage(g_idx=torch.zeros(60, **INTS)), ArtifactError, "the order of 64 inputs needs [64];"),
    "a layer larger than the model's": (
        "awq",
        damage(qweight=torch.zeros(128, 12, **INTS), qzeros=torch.zeros(4, 12, **INTS), scales=torch.zeros(4, 96).half()),
        ArtifactError,
        f"has '{LAYER}.weight' in the shape [96, 128], and its configuration says [96, 64]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoints_are_refused(tmp_path: Path, case: str) -> None:
    method, change, kind, text = WRONG[case]
    write(tmp_path, method)
    change(tmp_path)
    with pytest.raises(kind) as caught:
        load(str(tmp_path), with_inputs=False)
    assert text.replace("{LAYER}", LAYER) in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def compressed(folder: Path, weights: dict[str, Any] | None = None) -> Written:
    """A checkpoint of compressed-tensors in int4 with groups of 32, packed here, without its package."""
    made, state = write(folder, "gptq"), {}
    for layer, stored in made.layers.items():
        old = dict.fromkeys(f"{layer}.{leaf}" for leaf in ("qweight", "qzeros", "scales", "g_idx"))
        new = {"packed": words(stored.q, 4), "scale": torch.from_numpy(stored.scale), "shape": torch.tensor(stored.q.shape)}
        state |= old | {f"{layer}.weight_{leaf}": tensor for leaf, tensor in new.items()}
    change_tensors(folder, **{name.replace(".", "__"): tensor for name, tensor in state.items()})
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | (weights or {})
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    fields = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": ["lm_head"]}
    change_config(folder, **fields, **dict.fromkeys(("bits", "group_size", "desc_act", "sym")))
    return made


def scheme(**weights: Any) -> Callable[[Path], None]:
    given = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | weights
    return ask(config_groups={"group_0": {"targets": ["Linear"], "weights": given}})


COMPRESSED: dict[str, tuple[Callable[[Path], None], type[LissomError], str]] = {
    "format of tomorrow": (
        ask(format="nvfp4-pack-quantized"),
        UnsupportedError,
        "the format of compressed-tensors (format) is 'nvfp4-pack-quantized', and Lissom reads pack-quantized or int-quantized",
    ),
    "bits of 3": (
        scheme(num_bits=3),
        UnsupportedError,
        "the number of bits of 'group_0' (num_bits) is 3, and Lissom reads 4 or 8;",
    ),
    "type": (
        scheme(type="posit"),
        UnsupportedError,
        "the type of the weights of 'group_0' (type) is 'posit', and Lissom reads",
    ),
    "strategy": (
        scheme(strategy="attn_head"),
        UnsupportedError,
        "the scales of 'group_0' (strategy) is 'attn_head', and Lissom",
    ),
    "blocks": (
        scheme(strategy="block", group_size=None),
        UnsupportedError,
        "block_structure is None, and Lissom reads two sizes",
    ),
    "float4": (scheme(type="float"), UnsupportedError, "the number of bits of 'group_0' (num_bits) is 4, and Lissom reads 8;"),
    "packed floats": (scheme(type="float", num_bits=8), ArtifactError, "whose scheme has the type 'float'; copy"),
    "no groups": (ask(config_groups={}), UnsupportedError, "config_groups is {}, and Lissom reads an object with its"),
    "group of a list": (
        ask(config_groups={"W4A16": ["Linear"]}),
        UnsupportedError,
        "the group 'W4A16' is ['Linear'], and Lissom",
    ),
    "targets of numbers": (
        ask(config_groups={"a": {"targets": [1], "weights": {"num_bits": 4}}}),
        UnsupportedError,
        "config_groups.a.targets is 1, and Lissom reads names, classes and re: patterns of up to 500 characters",
    ),
    "a broken pattern": (ask(ignore=["re:("]), UnsupportedError, "ignore is 're:(', and Lissom reads names, classes and re:"),
    "a long pattern": (ask(ignore=["re:" + "a" * 1000]), UnsupportedError, "ignore is 're:aaaaaaaa"),
    "a slow pattern": (
        ask(ignore=["re:(.+)+x"]),
        UnsupportedError,
        "and Lissom reads names, classes and re: patterns of up to 500 characters and 5 repeats, of no group; name the",
    ),
    "many repeats": (ask(ignore=["re:" + ".*" * 6]), UnsupportedError, "ignore is 're:.*.*.*.*.*.*', and Lissom reads names,"),
    "ignored": (
        ask(ignore=["re:.*up_proj"]),
        ArtifactError,
        f"no group of quantization_config is for '{LAYER}', or it is among those to ignore, and its weight is stored quantized",
    ),
    "transforms": (
        ask(transform_config={"config_groups": {"R1": {"type": "hadamard"}}}),
        UnsupportedError,
        "a transform of activations (transform_config) is {'config_groups': {'R1': {'type': 'hadamard'}}}, and Lissom reads",
    ),
    "sparsity": (ask(sparsity_config={"format": "sparse-24-bitmask"}), UnsupportedError, "sparse storage (sparsity_config) is"),
    "partial group": (scheme(group_size=40), UnsupportedError, "so its last group is partial, and Lissom reads whole groups;"),
    "no scales": (damage(weight_scale=None), ArtifactError, f"lacks '{LAYER}.weight_scale', which its quantized weight needs;"),
    "no shape": (damage(weight_shape=None), ArtifactError, f"lacks '{LAYER}.weight_shape', which its quantized weight needs;"),
    "no zero points": (scheme(symmetric=False), ArtifactError, "weight_zero_point', and the scheme is asymmetric; copy"),
    "a huge shape": (
        damage(weight_shape=torch.tensor([1 << 40, 1 << 40])),
        ArtifactError,
        f"says that '{LAYER}.weight' has the shape [1099511627776, 1099511627776], and '{LAYER}.weight_packed' has the shape "
        "[96, 8], which is not that of 4 bits; copy the checkpoint again",
    ),
    "a negative shape": (damage(weight_shape=torch.tensor([-96, -64])), ArtifactError, "has the shape [-96, -64], and"),
    "a shape of three": (damage(weight_shape=torch.tensor([96, 8, 8])), ArtifactError, "needs [2]; copy"),
    "scales of another shape": (
        damage(weight_scale=torch.ones(96, 4)),
        ArtifactError,
        "needs [96, 2]; copy the checkpoint again",
    ),
    "bytes for words": (
        damage(weight_packed=None, weight_shape=None, weight=torch.zeros(96, 64, dtype=torch.float8_e4m3fn)),
        ArtifactError,
        f"stores '{LAYER}.weight' as F8_E4M3 in the shape [96, 64], and its scheme has 4 bits of type 'int' in a matrix; copy",
    ),
    "integers of more bits": (
        damage(weight_packed=None, weight_shape=None, weight=torch.full((96, 64), 9, dtype=torch.int8)),
        ArtifactError,
        f"has integers of more than 4 bits in '{LAYER}.weight'; copy the checkpoint again",
    ),
    "not rounded yet": (
        damage(weight_packed=None, weight_shape=None, weight=torch.zeros(96, 64)),
        UnsupportedError,
        f"stores '{LAYER}.weight' as F32 next to its scale, so it is not rounded yet; save the model with save_compressed=True",
    ),
}


@pytest.mark.parametrize("case", COMPRESSED)
def test_wrong_checkpoints_of_compressed_tensors_are_refused(tmp_path: Path, case: str) -> None:
    change, kind, text = COMPRESSED[case]
    compressed(tmp_path)
    change(tmp_path)
    with pytest.raises(kind) as caught:
        load(str(tmp_path), with_inputs=False)
    assert text in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_compressed_tensors_without_its_package(tmp_path: Path) -> None:
    made, ids = compressed(tmp_path), torch.arange(3, 15)[None]
    model = load(str(tmp_path), with_inputs=False).model
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, made.model(ids, use_cache=False).logits)


def test_groups_for_activations_alone_are_left_out(tmp_path: Path) -> None:
    compressed(tmp_path)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    attention = {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}
    change_config(tmp_path, config_groups=groups | {"attention": attention})
    notes = load(str(tmp_path), with_inputs=False).notes
    assert notes[0] == "the checkpoint quantizes activations too; here they stay in floating point, which is weight-only"
    assert "14 in int4 in groups of 32" in notes[1]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_fields_that_are_left_out(tmp_path: Path, method: str) -> None:
    """The layout, and of AWQ the bits, are then those of transformers' configurations."""
    write(tmp_path, method, symmetric=False)
    change_config(tmp_path, version=None, checkpoint_format=None, **({"bits": None} if method == "awq" else {}))
    assert "14 in uint4 in groups of 32" in load(str(tmp_path), with_inputs=False).notes[0]


def test_bytes_of_four_bits(tmp_path: Path) -> None:
    """naive-quantized: integers of four bits in int8, with a zero point for each group."""
    compressed(tmp_path, {"symmetric": True})
    q = torch.from_numpy(np.random.default_rng(0).integers(-8, 8, (96, 64))).to(torch.int8)
    zero = torch.from_numpy(np.random.default_rng(1).integers(-8, 8, (96, 2))).to(torch.int8)
    damage(weight_packed=None, weight_shape=None, weight=q, weight_zero_point=zero)(tmp_path)
    model = load(str(tmp_path), with_inputs=False).model
    weight = model.get_parameter(f"{LAYER}.weight")
    stored = stored_form(weight)
    assert stored is not None and stored.format == "uint4"
    blocks = stored.unpack()
    assert torch.equal(blocks.q.int() - 8, q.int()) and blocks.zero_point is not None
    assert torch.equal(blocks.zero_point.int() - 8, zero.int())
    wanted = (q.float() - zero.float().repeat_interleave(32, 1)) * blocks.scale.float().repeat_interleave(32, 1)
    assert torch.equal(weight.detach(), wanted)


def test_shards(tmp_path: Path) -> None:
    """Tensors of one layer in two files, named by an index."""
    from safetensors.torch import load_file, save_file

    made = write(tmp_path, "awq", symmetric=False)
    state = load_file(tmp_path / "model.safetensors")
    parts = {f"model-{number}.safetensors": dict(list(state.items())[number::2]) for number in (0, 1)}
    for file, part in parts.items():
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        found = load(str(tmp_path), with_inputs=False).model(ids, use_cache=False).logits
        assert torch.equal(found, made.model(ids, use_cache=False).logits)


def test_files_that_are_not_clear_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ArtifactError) as caught:
        load(str(tmp_path), with_inputs=False)
    assert "and neither is there (files: a.safetensors, b.safetensors); convert the weights to safetensors" in str(caught.value)


def test_other_methods_are_left_to_transformers() -> None:
    fields = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert quantization_config(Path("folder"), fields) is None
    assert quantization_config(Path("folder"), {}) is None
    inner = {"text_config": {"quantization_config": {"quant_method": "awq"}}}
    found = quantization_config(Path("folder"), inner)
    assert found is not None and found.method == "awq"


def test_generation_config_is_read(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    model: Any = load(str(tmp_path), with_inputs=False).model
    assert model.generation_config.temperature == 0.25


def test_compile_takes_the_folder(tmp_path: Path) -> None:
    made, ids = write(tmp_path, "awq", symmetric=False), torch.arange(3, 15)[None]
    compiled = lissom.compile(str(tmp_path), {"input_ids": ids, "use_cache": False}, goal=None)
    with torch.no_grad():
        wanted = made.model(ids, use_cache=False).logits
    # Sums of float32 in another order: 24 bits, logits up to 8.
    torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted, rtol=1e-4, atol=1e-4)


def test_saved_decoder_is_plain(tmp_path: Path) -> None:
    """It holds the integers, and its configuration says nothing of the checkpoint's format."""
    write(tmp_path / "from", "gptq", config=small_config("qwen3"))
    decoder = lissom.compile_generation(tmp_path / "from", max_length=32, passes="use-stored-weights", goal=None)
    decoder.save(tmp_path / "to")
    again = lissom.load_generation(tmp_path / "to")
    ids = torch.arange(3, 9)[None]
    assert torch.equal(again.step(ids), decoder.step(ids))
    size = sum(path.stat().st_size for path in (tmp_path / "to").iterdir() if path.suffix == ".safetensors")
    whole = 4 * sum(weight.numel() for weight in load(str(tmp_path / "from"), with_inputs=False).model.parameters())
    assert size < 0.5 * whole
