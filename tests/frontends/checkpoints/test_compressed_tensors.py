"""Tests of lissom.frontends.checkpoints.compressed_tensors: what the package writes, read by transformers and here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lissom
from lissom.frontends.checkpoints.compressed_tensors_config import Schemes
from lissom.frontends.models.huggingface import load
from lissom.ops.formats import FORMATS, unpack_halves
from lissom.ops.native import missing_weight_quantized_kernel
from lissom.ops.weight_quantized_linear import weight_quantized_linear
from tests.support.harness import step_of
from tests.support.neighbours import all_but_slow
from tests.support.quantized_checkpoints import change_config, small_config, write_compressed

IDS = torch.arange(3, 15)[None]
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


def group(target: str = "Linear", inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "strategy": "channel", "symmetric": True} | weights
    return {"targets": [target], "weights": weights} | ({} if inputs is None else {"input_activations": inputs})


BY_GROUP: dict[str, Any] = {"strategy": "group", "group_size": 32}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int4": ({"all": group(**BY_GROUP)}, {}),
    "int4, bfloat16": ({"all": group(**BY_GROUP)}, {"dtype": torch.bfloat16}),
    "int4, zero points": ({"all": group(**BY_GROUP, symmetric=False)}, {}),
    "int4, channels, zero points": ({"all": group(symmetric=False)}, {"config": {"kind": "qwen3"}}),
    "int4, odd sizes": ({"all": group(**BY_GROUP | {"group_size": 4})}, {"config": {"hidden": 36, "feed": 44}}),
    "int4, table too": ({"all": group(**BY_GROUP), "table": group("Embedding", num_bits=8)}, {}),
    "int8": ({"all": group(num_bits=8)}, {}),
    "int8, W8A8": ({"all": group(num_bits=8, inputs=TOKEN)}, {"config": {"kind": "qwen3", "tied": True}}),
    "int8, W8A8, zero points": ({"all": group(num_bits=8, strategy="tensor", symmetric=False, inputs=TOKEN)}, {}),
    "fp8": ({"all": group(num_bits=8, type="float", inputs=TOKEN | {"type": "float"})}, {}),
    "fp8, blocks": (
        {
            "all": group(
                num_bits=8,
                type="float",
                strategy="block",
                block_structure=[16, 32],
                inputs=TOKEN | {"type": "float", "strategy": "group", "group_size": 32},
            )
        },
        {},
    ),
}


def written(folder: Path, name: str) -> Path:
    pytest.importorskip("compressed_tensors", reason="the package that writes these checkpoints")
    groups, options = CASES[name]
    return write_compressed(folder, groups, **{**options, "config": small_config(**options.get("config", {}))})


def of_transformers(folder: Path, *, dequantize: bool = True) -> Any:
    """The model as transformers dequantizes it, in float32, with the package."""
    import transformers

    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=dequantize), dtype=torch.float32
        ).eval()


def of_package(folder: Path) -> Any:
    """The plain model with weights that the package decompresses, for a quantized table, which transformers does not load."""
    import transformers

    parts_of: Any = importlib.import_module
    registry = parts_of("compressed_tensors.compressors").BaseCompressor
    config = transformers.AutoConfig.from_pretrained(folder)
    schemes = parts_of("compressed_tensors.quantization").QuantizationConfig.model_validate(config.quantization_config)
    del config.quantization_config
    state = load_file(folder / "model.safetensors")
    layers = [name.removesuffix(".weight_scale") for name in state if name.endswith(".weight_scale")]
    for layer in layers:
        (scheme,) = [each for each in schemes.config_groups.values() if ("Embedding" in each.targets) == ("embed" in layer)]
        stored = {name.removeprefix(f"{layer}."): state.pop(name) for name in [*state] if name.startswith(f"{layer}.")}
        form = registry.get_value_from_registry(scheme.format or schemes.format)
        state[f"{layer}.weight"] = form.decompress(stored, scheme)["weight"]
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(state)
    return model


def check_integers(program: Any, folder: Path, name: str) -> int:
    """The program has the integers of the file, unpacked by the package; returns how many weights these are."""
    unpack = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers").unpack_from_int32
    state, found = load_file(folder / "model.safetensors"), program.weights()
    layers = [key.removesuffix("_scale") for key in state if key.endswith("weight_scale")]
    for layer in layers:
        bits = CASES[name][0].get("table", {}).get("weights", {}).get("num_bits", 8) if "embed" in layer else None
        bits = bits or CASES[name][0]["all"]["weights"]["num_bits"]
        q = state.get(layer)
        if q is None:
            q = unpack(state[f"{layer}_packed"], bits, torch.Size(state[f"{layer}_shape"].tolist()))
        forms = [form for form in ("int4", "uint4", "int8", "uint8", "fp8") if f"{layer}_{form}" in found]
        assert len(forms) == 1, layer
        kept = found[f"{layer}_{forms[0]}"]
        kept = unpack_halves(kept, FORMATS[forms[0]]) if bits == 4 else kept
        shift = (1 << (bits - 1)) if forms[0].startswith("u") else 0
        assert torch.equal(kept.float(), q.float() + shift), layer
        scale = state[f"{layer}_scale"].float()
        if scale.numel() in (1, len(q)):
            assert torch.equal(found[f"{layer}_scale"].float(), scale.reshape(-1, 1).expand(len(q), 1)), layer
    return len(layers)


@pytest.mark.parametrize("name", CASES)
def test_stored_integers_are_in_the_program(tmp_path: Path, name: str) -> None:
    written(tmp_path, name)
    checkpoint = load(str(tmp_path))
    optimized = lissom.optimize(checkpoint.model, {"input_ids": IDS, "use_cache": False}, passes="use-stored-weights")
    assert check_integers(optimized.program, tmp_path, name) == (15 if "table" in name else 14)
    wanted_model = of_package(tmp_path) if "table" in name else of_transformers(tmp_path)
    with torch.no_grad():
        found, wanted = (model(IDS, use_cache=False).logits for model in (checkpoint.model, wanted_model))
    if "bfloat16" in name:
        # The package rounds each dequantized weight to bfloat16, 2^-9 of its size; sums of 64 to 96 such errors of random signs
        # are 2 to 3 % of a layer's output after two layers.
        assert float((found - wanted).norm() / wanted.norm()) < 0.03
    else:
        assert torch.equal(found, wanted)
    # Sums of float32 in another order: 24 bits, logits up to 8.
    torch.testing.assert_close(optimized.program(input_ids=IDS, use_cache=False)[0], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    all_but_slow(
        ["int4, zero points", "int4, odd sizes", "int4, table too", "int8, W8A8", "fp8"],
        *("int4, table too", "int8, W8A8", "fp8"),
    ),
)
def test_decoder_runs_stored_integers(tmp_path: Path, name: str) -> None:
    written(tmp_path, name)
    decoder = lissom.compile_generation(tmp_path, max_length=32, goal=None)
    if missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) is None:
        assert len(decoder.program.nodes(weight_quantized_linear)) >= 8
    model = of_package(tmp_path) if "table" in name else of_transformers(tmp_path)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits[:, -1]
    # The kernels sum the products of a group before they scale them, in float32.
    torch.testing.assert_close(decoder.step(IDS), wanted, rtol=1e-4, atol=1e-4)
    decoder.reset()
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(decoder.generate(IDS, **options), model.generate(IDS, **options))


def test_activations_and_caches_stay_in_floating_point(tmp_path: Path) -> None:
    written(tmp_path, "int8, W8A8")
    change_config(tmp_path, kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert load(str(tmp_path), with_inputs=False).notes == (
        "the checkpoint quantizes activations too; here they stay in floating point, which is weight-only",
        "the checkpoint quantizes the KV cache; here it stays in floating point, unless quantize-cache is a pass",
        "the file stores 14 weights quantized (14 in int8 per channel); use-stored-weights reads them as they are",
    )
    decoder = lissom.compile_generation(tmp_path, max_length=32, passes="use-stored-weights", goal=None)
    step = step_of(decoder.report.history, "use-stored-weights")
    assert "the checkpoint quantizes the inputs of 14 layers too; here they stay in floating point" in step.notes


def test_schemes_of_layers(tmp_path: Path) -> None:
    """A pattern comes before a class, and a name before both."""
    pytest.importorskip("compressed_tensors", reason="the package that writes these checkpoints")
    groups = {
        "all": group(**BY_GROUP),
        "attention": group("re:.*self_attn.*", num_bits=8),
        "first": group("model.layers.0.self_attn.q_proj"),
    }
    write_compressed(tmp_path, groups, ignore=("lm_head", "re:.*layers.1.mlp.*"))
    checkpoint = load(str(tmp_path))
    assert checkpoint.notes[0] == (
        "the file stores 11 weights quantized (7 in int8 per channel, 3 in int4 in groups of 32, 1 in int4 per channel); "
        "use-stored-weights reads them as they are"
    )
    # Dequantizing, transformers takes the first scheme for all layers; the package, which runs compressed ones, each one's.
    with torch.no_grad():
        wanted = of_transformers(tmp_path, dequantize=False)(IDS, use_cache=False).logits
        assert torch.equal(checkpoint.model(IDS, use_cache=False).logits, wanted)


def test_patterns_go_by_their_text() -> None:
    fields = {
        "format": "pack-quantized",
        "config_groups": {"a": group("re:.*proj", num_bits=8), "b": group("re:.*.q_proj", num_bits=4)},
    }
    schemes = Schemes.read(Path("config.json"), fields)
    assert schemes.of("model.q_proj", ("Linear", "Module")).bits == 4
    assert schemes.of("model.k_proj", ("Linear", "Module")).bits == 8


def test_groups_of_inputs_that_are_not_neighbours(tmp_path: Path) -> None:
    """weight_g_idx, as packages before 0.17 wrote it with actorder=group; the order of no layer is marked by -1."""
    written(tmp_path, "int4, zero points")
    state, order = load_file(tmp_path / "model.safetensors"), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    layer, other = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
    before = load(str(tmp_path), with_inputs=False).model.get_parameter(f"{layer}.weight").detach()
    words = state[f"{layer}.weight_packed"].numpy().view("uint32")
    q = torch.from_numpy(((words[:, :, None] >> range(0, 32, 4)) & 15).reshape(64, 64).astype("int64"))[:, order]
    packed = (q.view(64, 8, 8) << torch.arange(0, 32, 4)).sum(-1)
    state[f"{layer}.weight_packed"] = torch.from_numpy(packed.numpy().astype("uint32").view("int32").copy())
    state[f"{layer}.weight_g_idx"] = (order // 32).int()
    state[f"{other}.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(str(tmp_path), with_inputs=False).model
    assert torch.equal(model.get_parameter(f"{layer}.weight").detach(), before[:, order])
    program = lissom.optimize(model, {"input_ids": IDS, "use_cache": False}, passes="use-stored-weights").program
    assert len(program.nodes(torch.ops.aten.index_select.default)) == 1
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
    # Sums of float32 in another order: 24 bits, logits up to 8.
    torch.testing.assert_close(program(input_ids=IDS, use_cache=False)[0], wanted, rtol=1e-4, atol=1e-4)
