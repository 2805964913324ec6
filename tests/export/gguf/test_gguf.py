"""GGUF files of optimized decoders, read back by the package that defines the format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.errors import ArtifactError, UnsupportedError
from lissom.export.gguf import comparison
from lissom.export.gguf.families import FAMILIES, Sizes, describe, family_of
from lissom.export.gguf.layers import fit
from lissom.export.gguf.vocabulary import read_vocabulary
from lissom.export.gguf.weights import Blocks, blocks_of, joined, padded, read_weights, with_rows
from lissom.export.gguf.writer import encoded
from lissom.frontends.models.huggingface import load
from lissom.ops.formats import FORMATS, dequantize, quantize, scale_for
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.ops.quantization import fake_quantize
from tests.support.gguf_models import byte_fallback, byte_level, decoder, optimized, save_checkpoint
from tests.support.models import normal
from tests.support.quantized_checkpoints import write

gguf = pytest.importorskip("gguf")


def rounded(format: str, shape: tuple[int, int], half: bool = True) -> StoredBlocks:
    """A weight [8, 64] in a format, with scales of this shape."""
    weight, form = normal(8, 64, seed=1), FORMATS[format]
    parts = weight.unflatten(0, (shape[0], -1)).unflatten(-1, (shape[1], -1))
    scale, zero_point = scale_for(parts.amin((1, 3)), parts.amax((1, 3)), form)
    scale = scale.half() if half else scale
    zero_point = None if zero_point is None else zero_point.to(torch.uint8)
    return StoredBlocks(quantize(weight, scale, zero_point, form), scale, zero_point, format)


@pytest.mark.parametrize(("format", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
@pytest.mark.parametrize("groups", [1, 2])
def test_integers_with_float16_scales_are_written_to_the_bit(format, kind, groups):
    stored = rounded(format, (8, groups))
    found = blocks_of(stored)
    assert found is not None and found.kind.name == kind
    read = torch.from_numpy(gguf.dequantize(found.data.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(read, dequantize(stored.q, stored.scale, None, torch.float32))
    assert torch.equal(found.value(), read)


def test_columns_in_the_order_of_groups_are_written_in_the_order_of_inputs(tmp_path):
    """Of a GPTQ checkpoint with desc_act, whose layers read their input sorted."""

    def groups(columns, group):
        return np.random.default_rng(columns).permutation(np.arange(columns) // group)

    made = write(tmp_path, "gptq", scattered=groups)
    model = load(str(tmp_path), with_inputs=False).model
    inputs = {"input_ids": torch.arange(3, 15)[None], "use_cache": False}
    program = lissom.optimize(model, inputs, passes="use-stored-weights").program
    weights = read_weights(program, model, 0.0)
    for layer in made.layers:
        assert torch.equal(weights[f"{layer}.weight"], made.model.get_parameter(f"{layer}.weight").detach()), layer


def test_other_scales_are_rounded_to_float16():
    for format, shape in (("int8", (8, 1)), ("int8", (1, 1)), ("uint4", (8, 2))):
        stored = rounded(format, shape, half=False)
        found = blocks_of(stored)
        assert found is not None
        wanted = dequantize(stored.q, stored.scale, stored.zero_point, torch.float32)
        read = torch.from_numpy(gguf.dequantize(found.data.numpy(), gguf.GGMLQuantizationType[found.kind.name]))
        # Half a unit in the last of 11 bits, of scale · q and of scale · zero_point; both are 15 scales at most in uint4.
        bound = wanted.abs() / 2048 if stored.zero_point is None else 30 * stored.scale.max() / 2048
        assert bool(((read - wanted).abs() <= bound + 1e-7).all())


def test_weights_that_no_block_holds_stay_in_floating_point():
    assert blocks_of(rounded("uint8", (8, 1))) is None
    assert blocks_of(rounded("int4", (8, 4))) is None  # groups of 16
    stored = rounded("int8", (8, 2))
    assert blocks_of(StoredBlocks(stored.q, stored.scale.float() * 1e9, None, "int8")) is None
    assert blocks_of(StoredBlocks(stored.q, stored.scale.float() * 1e-6, None, "int8")) is None
    assert blocks_of(StoredBlocks(stored.q[:, :48], stored.scale[:, :1], None, "int8")) is None


def test_blocks_are_moved_padded_and_joined_like_the_weight():
    weight = blocks_of(rounded("int4", (8, 2)))
    assert weight is not None
    value, order = weight.value(), torch.arange(7, -1, -1)
    assert torch.equal(with_rows(weight, order).value(), value[order])  # pyright: ignore
    larger = padded(weight, (10, 96))
    assert isinstance(larger, Blocks) and torch.equal(larger.value(), torch.nn.functional.pad(value, (0, 32, 0, 2)))
    odd = padded(weight, (8, 70))
    assert isinstance(odd, torch.Tensor) and torch.equal(odd, torch.nn.functional.pad(value, (0, 6)))
    both = joined([weight, weight])
    assert isinstance(both, Blocks) and torch.equal(both.value(), value.repeat(2, 1))
    assert torch.equal(joined([weight, value]), value.repeat(2, 1))  # pyright: ignore


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metadata and the tensors, dequantized."""
    reader = gguf.GGUFReader(str(path))
    tensors = {item.name: torch.from_numpy(gguf.dequantize(item.data, item.tensor_type).copy()) for item in reader.tensors}
    return {name: item.contents() for name, item in reader.fields.items()}, tensors


@pytest.fixture(scope="module")
def pruned() -> Any:
    """A Llama whose layers have different widths."""
    return optimized(decoder("llama", 140, layers=2), 'prune-neurons{amounts="model.layers.0=32"}')


def test_each_layer_has_its_own_width(pruned, tmp_path):
    written = pruned.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == written.architecture == "deci"
    assert fields["deci.feed_forward_length"] == [32, 96] and fields["deci.attention.head_count"] == [4, 4]
    weights = pruned.program.weights()
    assert torch.equal(tensors["blk.0.ffn_up.weight"], weights["model.layers.0.mlp.up_proj.weight"])
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    # Feature 1 of a head is the first of its second half, 8 of 16.
    assert torch.equal(tensors["blk.1.attn_q.weight"][[0, 1, 2, 17]], query[[0, 8, 1, 24]])
    assert "tensors: 21 in F32; " in str(written)


def test_what_was_not_compared_is_told(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "PACKAGE", "package_that_nobody_has")
    written = pruned.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    assert written.difference is None
    assert str(written).endswith("; not compared: llama.cpp, which is not installed, pip install 'lissom[llama-cpp]'")


def test_dtype_is_that_of_matrices(pruned, tmp_path):
    for dtype, rounding in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        written = pruned.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level(), dtype=dtype)
        assert written.types == {dtype.upper(): 16, "F32": 5}
        _, tensors = read(tmp_path / "model.gguf")
        wanted = pruned.program.weights()["model.layers.0.mlp.up_proj.weight"]
        assert torch.equal(tensors["blk.0.ffn_up.weight"], wanted.to(rounding).float())


def test_a_file_is_written_completely_or_not_at_all(pruned, tmp_path):
    path, tokenizer = tmp_path / "model.gguf", byte_level()
    path.write_text("mine")
    (tmp_path / "link.gguf").symlink_to(path)
    cases = {
        "dtype= is 'q4_0'; choose f32, f16, bf16": (UnsupportedError, path, {"tokenizer": tokenizer, "dtype": "q4_0"}),
        "has no tokenizer; pass tokenizer=": (UnsupportedError, path, {}),
        "is a symbolic link": (ArtifactError, tmp_path / "link.gguf", {"tokenizer": tokenizer}),
        "it is a directory": (ArtifactError, tmp_path, {"tokenizer": tokenizer}),
        "there is no directory": (ArtifactError, tmp_path / "no" / "model.gguf", {"tokenizer": tokenizer}),
        "cannot be looked up": (ArtifactError, "\0.gguf", {"tokenizer": tokenizer}),
    }
    for sentence, (kind, target, options) in cases.items():
        with pytest.raises(kind, match=sentence):
            pruned.export_gguf(target, **options)
    assert path.read_text() == "mine" and len([*tmp_path.iterdir()]) == 2


def test_values_that_float16_cannot_hold_are_refused():
    weight = normal(2, 32)
    weight[1, 5] = 1e6
    with pytest.raises(UnsupportedError, match=r"'output.weight' has values that f16 cannot hold; choose dtype='bf16'"):
        encoded("output.weight", weight, "f16")
    assert encoded("output.weight", weight, "bf16")[0] == "BF16"


@pytest.mark.slow
def test_command_writes_file_with_tokenizer_of_folder(tmp_path):
    tokenizer = save_checkpoint(tmp_path / "model")
    file = tmp_path / "model.gguf"
    told = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(file), "--passes", "quantize{scheme=int4-weight}"])
    assert told.exit_code == 0, told.output
    assert f"{file}: 0.1 MB for the graph 'qwen2' of llama.cpp; tensors: 8 in F32, 7 in Q4_1" in told.output
    fields, tensors = read(file)
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id and len(tensors) == 15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passes", "sentence"),
    [
        ("quantize{scheme=int8-dynamic}", "quantizes activations, at '.*', which a GGUF file cannot say"),
        ("low-rank{rank=8}", "no GGUF file holds this program|has no weight for 'model.layers.0"),
    ],
)
def test_what_no_file_says_is_refused(passes, sentence, tmp_path):
    with pytest.raises(UnsupportedError, match=sentence):
        optimized(decoder("llama", 140, layers=1), passes).export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("llama", {"hidden_act": "gelu"}, "the graph 'llama' of llama.cpp has hidden_act='silu', and this model 'gelu'"),
        ("mistral", {"sliding_window": 8}, "has sliding_window=None, and this model 8"),
        ("bert", {}, "GGUF files are written for models of type llama, mistral, qwen2, qwen3, gemma3_text, phi3, gpt2"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(family, fields, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        family_of(transformers.CONFIG_MAPPING[family](**fields))


def gemma(kinds: str, **fields: Any) -> Any:
    """A configuration of Gemma 3 with layers of full (f) and sliding (s) attention."""
    names = [{"f": "full_attention", "s": "sliding_attention"}[kind] for kind in kinds]
    return transformers.Gemma3TextConfig(num_hidden_layers=len(kinds), layer_types=names, query_pre_attn_scalar=256, **fields)


@pytest.mark.parametrize(("kinds", "period"), [("sssssfsssssf", 6), ("sf", 2), ("fff", 1), ("ss", 3)])
def test_every_nth_layer_of_gemma_has_full_attention(kinds, period):
    writer = gguf.GGUFWriter(None, "gemma3")
    describe(writer, gemma(kinds), Sizes((4,) * len(kinds), (2,) * len(kinds), (32,) * len(kinds)))
    assert writer.kv_data[0]["gemma3.attention.sliding_window_pattern"].value == period


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (gemma("sfssf"), "has full attention in every n-th layer, and this program in layers 1, 4 of 5"),
        (gemma("sf", head_dim=128), "scales queries by 1/√128, and this model by 1/√256"),
        (
            transformers.LlamaConfig(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
            "has type 'yarn' over 100% of a head",
        ),
    ],
)
def test_positions_that_llama_cpp_computes_otherwise_are_refused(config, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        describe(gguf.GGUFWriter(None, "gemma3"), config, Sizes((4,), (2,), (32,)))


def test_head_groups_of_several_sizes_need_per_layer_graphs():
    config = transformers.Qwen2Config(num_attention_heads=4, hidden_size=64, num_hidden_layers=2)
    with pytest.raises(UnsupportedError, match="has 1, 2 query heads for each key/value head"):
        fit({}, Sizes((4, 2), (2, 2), (32, 32)), FAMILIES["qwen2"], config)


def test_byte_level_vocabulary():
    tokenizer = byte_level()
    fields = {name.rpartition(".")[2]: value[0] for name, value in read_vocabulary(tokenizer, None, 150).fields.items()}
    assert fields["model"] == "gpt2" and fields["pre"] == "gpt-2" and not fields["add_bos_token"]
    assert fields["tokens"][tokenizer.eos_token_id] == "</s>" and fields["eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokens"][len(tokenizer) :] == [f"[PAD{index}]" for index in range(len(tokenizer), 150)]
    types = gguf.TokenType
    assert [fields["token_type"][at] for at in (0, 10, 149)] == [types.CONTROL, types.NORMAL, types.UNUSED]


def test_vocabulary_with_bytes_has_scores_in_order_of_merges():
    tokenizer = byte_fallback()
    fields = {
        name.rpartition(".")[2]: value[0] for name, value in read_vocabulary(tokenizer, None, len(tokenizer)).fields.items()
    }
    assert fields["model"] == "llama" and fields["add_space_prefix"] is False
    scores = dict(zip(fields["tokens"], fields["scores"], strict=True))
    first, second = ("".join(pair) for pair in tokenizer_merges(tokenizer)[:2])
    assert scores[first] == -1 and scores[second] == -2
    types = dict(zip(fields["tokens"], fields["token_type"], strict=True))
    assert types["<0x0A>"] == gguf.TokenType.BYTE and types["<unk>"] == gguf.TokenType.UNKNOWN


def tokenizer_merges(tokenizer: Any) -> list[list[str]]:
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


def test_other_tokenizers_are_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    split = Tokenizer(models.BPE({"a": 0}, []))
    split.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])
    for backend in (words, split):
        with pytest.raises(
            UnsupportedError, match=r"llama.cpp has no tokenizer like this one, (WordPiece|BPE after Punctuation)"
        ):
            read_vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), None, 4)
    with pytest.raises(UnsupportedError, match=r"has a token \d+, and the model's embedding table has 4 rows"):
        read_vocabulary(byte_level(), None, 4)
    with pytest.raises(UnsupportedError, match="give a fast tokenizer of transformers"):
        read_vocabulary(object(), None, 4)


def test_mxfp4_is_written_to_the_bit(tmp_path):
    model = optimized(decoder("llama", 140, layers=1), "quantize{scheme=mxfp4-weight}")
    written = model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    assert written.types == {"MXFP4": 7, "F32": 5}
    _, tensors = read(tmp_path / "model.gguf")
    quantizers = {str(node.args[0].target): node for node in model.program.nodes(fake_quantize)}
    for name, leaf in (("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
        node = quantizers[f"model.layers.0.mlp.{name}.weight"]
        operands = [model.program.weight(str(operand.target)).detach() for operand in node.all_input_nodes]
        assert torch.equal(tensors[f"blk.0.{leaf}.weight"], fake_quantize(*operands, **node.kwargs))


def test_other_block_formats_are_written_in_floating_point(tmp_path):
    for scheme in ("mxfp8-weight", "nvfp4-weight"):
        model = optimized(decoder("llama", 140, layers=1), f"quantize{{scheme={scheme}}}")
        assert model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level()).types == {"F32": 12}
        _, tensors = read(tmp_path / "model.gguf")
        (node,) = [call for call in model.program.nodes(fake_quantize) if "up_proj" in str(call.args[0].target)]
        operands = [model.program.weight(str(operand.target)).detach() for operand in node.all_input_nodes]
        torch.testing.assert_close(tensors["blk.0.ffn_up.weight"], fake_quantize(*operands, **node.kwargs), rtol=0, atol=0)
