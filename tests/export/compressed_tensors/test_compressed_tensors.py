"""Checkpoints of compressed-tensors, loaded by transformers in a fresh process and by the reader here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import lissom
from lissom.api import Optimized
from lissom.cli.main import app
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.export.checkpoint import plain_model
from lissom.export.compressed_tensors.kv_cache import _outputs, _round, describe_rounding, measure
from lissom.export.compressed_tensors.layers import padded
from lissom.export.compressed_tensors.reload import reload
from lissom.export.compressed_tensors.writer import CompressedCheckpoint
from lissom.export.fresh_process import error_of, outputs_of
from lissom.export.quantized_weights import in_floating_point, quantized_weights
from lissom.frontends.models.huggingface import load
from lissom.ops.formats import FORMATS, dequantize, quantize, scale_for
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights
from tests.support.compressed_checkpoints import IDS, optimized
from tests.support.gguf_models import save_checkpoint
from tests.support.models import normal
from tests.support.neighbours import all_but_slow
from tests.support.quantized_checkpoints import change_tensors, small_config, small_model

pytest.importorskip("compressed_tensors", reason="the package that writes these checkpoints")

MLP_IN_INT4 = 'quantize{scheme=int8-weight,schemes="*mlp*=int4-weight",symmetric=true}'
MLP_ALONE_IN_INT4 = 'quantize{scheme=int8-dynamic,schemes="*mlp*=int4-weight",symmetric=true}'
PRUNED = "prune-heads{keep=0.5},prune-neurons{keep=0.67,scope=layer},"


@dataclass(frozen=True)
class Case:
    """A model, its passes, and the schemes of the layers of the checkpoint."""

    passes: str
    schemes: dict[str, int]
    config: dict[str, Any]
    dtype: torch.dtype = torch.float32

    @property
    def rounds_inputs(self) -> bool:
        return any("inputs" in scheme for scheme in self.schemes)

    @property
    def has_packed_zero_points(self) -> bool:
        return any(scheme.startswith("uint") and "inputs" not in scheme for scheme in self.schemes)


WIDE = {"hidden": 256, "feed": 256}
CASES = {
    "int4": Case("quantize{scheme=int4-weight,symmetric=true}", {"int4 in groups of 32": 14}, {}),
    "int4, groups of 128": Case(
        "quantize{scheme=int4-weight,group=128,symmetric=true,skip=*o_proj}", {"int4 in groups of 128": 12}, WIDE
    ),
    "int4, tied, qwen3": Case(
        "quantize{scheme=int4-weight,symmetric=true}", {"int4 in groups of 32": 14}, {"kind": "qwen3", "tied": True}
    ),
    "int4, zero points": Case("quantize{scheme=int4-weight}", {"uint4 in groups of 32": 14}, {"tied": True}),
    "int4, bfloat16": Case("quantize{scheme=int4-weight,symmetric=true}", {"int4 in groups of 32": 14}, {}, torch.bfloat16),
    "int8": Case("quantize{scheme=int8-weight}", {"int8 per channel": 14}, {"kind": "qwen3"}),
    "int8, per tensor, LM head": Case(
        "quantize{scheme=int8-weight,granularity=tensor,lm_head=true}", {"int8 per tensor": 15}, {}
    ),
    "int8, zero points": Case("quantize{scheme=int8-weight,symmetric=false}", {"uint8 per channel": 14}, {}),
    "W8A8": Case("quantize{scheme=int8-dynamic}", {"int8 per channel with inputs in int8": 14}, {}),
    "W8A8, tied, qwen3": Case(
        "quantize{scheme=int8-dynamic}", {"int8 per channel with inputs in int8": 14}, {"kind": "qwen3", "tied": True}
    ),
    "W8A8, fixed": Case("quantize{scheme=int8-static}", {"int8 per channel with inputs in fixed int8": 14}, {"tied": True}),
    "fp8": Case("quantize{scheme=fp8}", {"fp8 per channel with inputs in fp8": 14}, {}),
    "mixed": Case(MLP_IN_INT4, {"int8 per channel": 8, "int4 in groups of 32": 6}, {}),
    "mixed, W8A8": Case(
        MLP_ALONE_IN_INT4, {"int8 per channel with inputs in int8": 8, "int4 in groups of 32": 6}, {"kind": "qwen3"}
    ),
    "one layer": Case("quantize{scheme=int8-weight,only=*layers.0*}", {"int8 per channel": 7}, {}),
    "pruned": Case(PRUNED + "quantize{scheme=int4-weight,symmetric=true}", {"int4 in groups of 32": 14}, {}),
    "several widths": Case(
        'prune-neurons{amounts="model.layers.0=64"},quantize{scheme=int4-weight}',
        {"uint4 in groups of 32": 14},
        {"kind": "qwen3"},
    ),
}
NAMES = all_but_slow(CASES, "int4", "mixed, W8A8")
Exported = tuple[Optimized, CompressedCheckpoint, Path]
ELSEWHERE = """
import sys, torch, transformers
from safetensors.torch import save_file
folder, out, dequantize = sys.argv[1:]
how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize == "True" else {}
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
ids = torch.arange(3, 27).view(2, 12)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids, use_cache=False).logits.clone()}, out)
assert "lissom" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The export of a case by its name, made once."""

    @cache
    def make(name: str) -> Exported:
        case, folder = CASES[name], tmp_path_factory.mktemp("exported") / "checkpoint"
        found = optimized(case.passes, small_model(small_config(**case.config)).to(case.dtype))
        return found, found.save_compressed(folder), folder

    return make


def elsewhere(folder: Path, out: Path, case: Case) -> torch.Tensor:
    """The logits of transformers in a process without Lissom."""
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(out), str(case.has_packed_zero_points)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return load_file(out)["logits"]


def plain_logits(found: Optimized) -> torch.Tensor:
    """The logits of the original model's class with the dequantized weights of the program, by PyTorch alone."""
    folded, _ = Pipeline([FoldQuantizedWeights()], found._example, checks="off").run(found.program)
    quantized = {weight.name: weight for weight in quantized_weights(folded)}
    weights = {name: weight for name, weight in folded.weights().items() if name not in quantized}
    dtype = next(found._model.parameters()).dtype  # pyright: ignore
    weights |= {name: in_floating_point(weight.stored).to(dtype) for name, weight in quantized.items()}
    made = plain_model(weights, folded, found._model, 128).model.eval()  # pyright: ignore
    with torch.no_grad():
        return made(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", all_but_slow(CASES, "int4"))
def test_transformers_computes_the_program_in_a_fresh_process(exported, tmp_path, name):
    case = CASES[name]
    found, written, folder = exported(name)
    assert dict(written.schemes) == case.schemes
    assert written.notes[-1].startswith("not compared: vLLM")
    logits, program = elsewhere(folder, tmp_path / "logits", case), found.program.run([IDS])[0]
    assert isinstance(program, torch.Tensor)
    if case.rounds_inputs:
        # Rounded by two libraries: x / scale + zero_point in one step here, in two there. On these 24 tokens few values are
        # near the middle of two integers; each changes its token's logits by a part of a step, 1/255 of the range.
        torch.testing.assert_close(logits, program, atol=0.02 * float(program.abs().max()), rtol=0)
        assert any("outputs differ by" in note for note in written.notes)
    elif case.dtype == torch.bfloat16:
        # The program and transformers round to 8 bits at other places, some twenty times.
        torch.testing.assert_close(logits, program, atol=0.08 * float(program.abs().max()), rtol=0)
    else:
        assert torch.equal(logits, plain_logits(found))
        # Sums of float32 in another order: 24 bits, logits up to 8.
        torch.testing.assert_close(logits, program, atol=1e-4, rtol=1e-4)
        assert written.relative_error < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_reader_finds_the_integers_of_the_program(exported, name):
    case = CASES[name]
    found, _, folder = exported(name)
    folded, _ = Pipeline([FoldQuantizedWeights()], found._example, checks="off").run(found.program)
    read = load(str(folder))
    program = lissom.optimize(read.model, {"input_ids": IDS, "use_cache": False}, passes="use-stored-weights").program
    again = {weight.name: weight.stored for weight in quantized_weights(program)}
    wanted = {weight.name: weight.stored for weight in quantized_weights(folded) if "embed" not in weight.name}
    wanted.pop("lm_head.weight", None) if case.config.get("tied") else None
    assert again.keys() == wanted.keys() and len(again) == sum(case.schemes.values())
    for layer, stored in wanted.items():
        kept = again[layer]
        (rows, columns), scale = stored.q.shape, stored.scale.to(case.dtype).float()
        assert kept.format == stored.format
        assert torch.equal(kept.q[:rows, :columns].float(), stored.q.float()), layer
        groups = 1 if scale.numel() == 1 else scale.shape[1]
        assert torch.equal(kept.scale[:rows, :groups].float(), scale.expand(rows, groups)), layer
        # The padding is zeros.
        whole = dequantize(kept.q, kept.scale, kept.zero_point, torch.float32)
        assert not whole[rows:].any() and not whole[:, columns:].any()
        if stored.zero_point is not None:
            assert kept.zero_point is not None and torch.equal(kept.zero_point[:rows, :groups], stored.zero_point), layer


@pytest.mark.slow
def test_what_is_written(tmp_path):
    """The configuration that servers read: several schemes by names, one by the class."""
    written = optimized(MLP_IN_INT4).save_compressed(tmp_path / "mixed")
    assert "the feed-forward is padded with zeros from 96 to 128 neurons" in written.notes[0]
    assert "'model.layers.0.self_attn.q_proj' has 128 outputs and 64 inputs" in str(written)
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())
    assert config["intermediate_size"] == 128
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors" and quantization["ignore"] == ["lm_head"]
    targets = [group["targets"] for group in quantization["config_groups"].values()]
    assert sorted(map(len, targets)) == [6, 8] and all(name.startswith("model.layers.") for names in targets for name in names)
    optimized("quantize{scheme=int8-dynamic}").save_compressed(tmp_path / "one")
    quantization = json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]
    (group,) = quantization["config_groups"].values()
    assert quantization["format"] == "int-quantized" and group["targets"] == ["Linear"]
    inputs = group["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["symmetric"], inputs["dynamic"]) == (8, "token", False, True)


def test_scales_of_keys_and_values_are_measured_on_data(tmp_path):
    """They are the largest of the data, not of the example, and what rounding changes is told."""
    ids = torch.randint(3, 40, (4, 30), generator=torch.Generator().manual_seed(0))
    found = optimized("quantize{scheme=int8-weight}", ids=ids[:, :5])
    model: Any = found._model
    written = found.save_compressed(tmp_path / "checkpoint", kv_cache="fp8", data=[{"input_ids": ids[:2]}, {"input_ids": ids}])
    assert written.relative_error < 2e-5
    note = next(note for note in written.notes if note.startswith("keys and values in fp8 change the outputs by "))
    assert 1e-3 < float(note.split(" by ")[1].split()[0]) < 0.5
    scheme = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"], scheme["dynamic"]) == (8, "float", "tensor", False)
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)["cache"]
    for index, layer in enumerate(cache.layers):
        for part, tensor in (("k", layer.keys), ("v", layer.values)):
            # The weights in int8 change keys and values by a few thousandths.
            wanted = float(tensor.abs().max()) / 448
            assert float(stored[f"model.layers.{index}.self_attn.{part}_scale"]) == pytest.approx(wanted, rel=0.02)


def test_a_library_that_rounds_keys_and_values_otherwise_is_found_out():
    found = optimized("quantize{scheme=int4-weight,symmetric=true}")
    model: Any = found._model
    call = {"input_ids": IDS, "use_cache": False}
    measured = measure(model, [call], call)
    with torch.no_grad():
        exact = [model(**call)["logits"]]
    told = describe_rounding(found.program, measured, measured.rounded, exact)
    assert told.endswith("those of transformers differ by 0.0e+00")
    scale = torch.tensor(8.0)
    coarser = _outputs(model, call, lambda _, keys, values: (_round(keys, scale), _round(values, scale)))
    with pytest.raises(UnsupportedError, match="transformers rounds the keys and values of LlamaForCausalLM otherwise"):
        describe_rounding(found.program, measured, coarser, exact)


@pytest.mark.slow
def test_rounded_inputs_differ_by_less_than_rounding_changes(tmp_path):
    """Of more layers and tokens, where some values are rounded the other way."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=500, initializer_range=0.1)
    ids = torch.randint(3, 500, (8, 48), generator=torch.Generator().manual_seed(0))
    found = optimized("quantize{scheme=int8-dynamic}", small_model(config).float(), ids)
    written = found.save_compressed(tmp_path / "checkpoint")
    note = next(note for note in written.notes if "outputs differ by" in note)
    assert 0 < written.relative_error < 0.2 and "and by 0.0e+00 with inputs in floating point" in note


@pytest.mark.slow
def test_difference_of_a_changed_checkpoint_is_found(tmp_path):
    """A scale, and an option of the configuration, that changed after the checkpoint was written."""
    found = optimized("quantize{scheme=int4-weight,symmetric=true}")
    found.save_compressed(tmp_path)
    model: Any = found._model
    layers = [name for name, module in model.named_modules() if name.endswith("_proj")]
    first = reload(found.program, model, found._example, tmp_path, layers, dequantize=False)
    wanted = outputs_of(found.program, found._example)
    assert error_of(first.outputs, wanted) < 2e-5
    scale = load_file(tmp_path / "model.safetensors")[f"{layers[3]}.weight_scale"]
    change_tensors(tmp_path, **{f"{layers[3]}.weight_scale".replace(".", "__"): scale * 2})
    second = reload(found.program, model, found._example, tmp_path, layers, dequantize=False)
    assert [layer for layer in layers if first.hashes[layer] != second.hashes[layer]] == [layers[3]]
    assert error_of(second.outputs, wanted) > 1e-3
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnsupportedError, match=r"transformers does not run the checkpoint of Llama\w+ in a fresh process"):
        reload(found.program, model, found._example, tmp_path, layers, dequantize=False)


@pytest.mark.parametrize("shape", [(8, 64), (8, 96), (12, 64), (12, 128)])
@pytest.mark.parametrize("format", ["int4", "uint4", "int8", "uint8", "fp8"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 1), (8, 2)])
def test_padding_is_zeros(format, groups, shape):
    weight, form = normal(8, 64, seed=1), FORMATS[format]
    parts = weight.unflatten(0, (groups[0], -1)).unflatten(-1, (groups[1], -1))
    scale, zero_point = scale_for(parts.amin((1, 3)), parts.amax((1, 3)), form)
    zero_point = None if zero_point is None else zero_point.to(torch.uint8)
    stored = StoredBlocks(quantize(weight, scale, zero_point, form), scale, zero_point, format)
    larger = padded(stored, shape)
    wanted = torch.nn.functional.pad(stored.dequantize(slice(None)), (0, shape[1] - 64, 0, shape[0] - 8))
    assert larger.q.dtype == stored.q.dtype
    assert torch.equal(dequantize(larger.q, larger.scale, larger.zero_point, torch.float32), wanted)


def test_command_writes_a_checkpoint_with_the_tokenizer(tmp_path):
    save_checkpoint(tmp_path / "model")
    options = ["--format", "compressed-tensors", "--passes", "quantize{scheme=int8-weight}"]
    told = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "out"), *options])
    assert told.exit_code == 0, told.output
    assert "layers: 7 in int8 per channel; loaded by transformers in a fresh process" in told.output
    assert "not compared: vLLM" in told.output and (tmp_path / "out" / "tokenizer.json").is_file()
    again = CliRunner().invoke(app, ["export", "nowhere", str(tmp_path / "out"), *options])
    assert again.exit_code == 1 and "exists and is not an artifact" in str(again.exception)
