"""GGUF files of families that fuse projections: Phi-3, and GPT-2, which also transposes them."""

from __future__ import annotations

import pytest
import torch
import transformers

from lissom.errors import UnsupportedError
from lissom.export.gguf.families import FAMILIES, Sizes, describe, family_of
from lissom.export.gguf.k_types import type_of
from lissom.export.gguf.layers import fit
from lissom.export.gguf.projections import assign, parameters_of, separated
from lissom.export.gguf.vocabulary import Vocabulary, read_vocabulary
from lissom.export.gguf.weights import Blocks, blocks_of, rows_of, value_of
from lissom.export.gguf.writer import encoded
from lissom.frontends.models.huggingface import load
from lissom.ops.gguf_blocks import StoredBlocks
from lissom.ops.quantization import fake_quantize
from tests.export.gguf.test_gguf import read
from tests.support.gguf_models import byte_fallback, byte_level, decoder, optimized

gguf = pytest.importorskip("gguf")
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [float(at + 1) for at in range(8)]}
LONGROPE |= {"rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_projections_are_separated_and_fused_again(family):
    model, other = (decoder(family, 140, layers=2, initializer_range=spread) for spread in (0.2, 0.1))
    parts = separated(parameters_of(model), FAMILIES[family])
    assert parts["model.layers.1.self_attn.q_proj.weight"].shape == (64, 64)
    assert parts["model.layers.1.self_attn.v_proj.weight"].shape == ((32 if family == "phi3" else 64), 64)
    assert parts["model.layers.1.mlp.down_proj.weight"].shape == (64, 96)
    assign(other, parts, FAMILIES[family])
    other.tie_weights()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_rows_of_blocks_keep_the_values_of_the_program():
    q = torch.arange(-32, 32, dtype=torch.int8).repeat(6, 1)
    for scale in (torch.rand(6, 2) + 0.5, torch.rand(1, 2) + 0.5, torch.tensor(0.3)):
        whole = blocks_of(StoredBlocks(q, scale, None, "int8"))
        assert whole is not None and whole.exact is not None
        part = rows_of(whole, slice(2, 5))
        assert isinstance(part, Blocks) and part.exact is not None
        assert torch.equal(part.value(), whole.value()[2:5])
        assert torch.equal(value_of(part), value_of(whole)[2:5])


def test_phi3_has_fused_tensors(tmp_path):
    model = optimized(decoder("phi3", 140, layers=1))
    written = model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    fields, tensors = read(tmp_path / "model.gguf")
    weights = model.program.weights()
    assert written.architecture == "phi3" and len(tensors) == 9
    assert torch.equal(tensors["blk.0.attn_qkv.weight"], weights["model.layers.0.self_attn.qkv_proj.weight"])
    assert torch.equal(tensors["blk.0.ffn_up.weight"], weights["model.layers.0.mlp.gate_up_proj.weight"])
    assert fields["phi3.attention.head_count_kv"] == 2 and fields["phi3.attention.sliding_window"] == 0


def test_pruned_heads_of_phi3_are_written_for_the_graphs_of_llama(tmp_path):
    model = optimized(decoder("phi3", 140, layers=2), 'prune-heads{amounts="model.layers.0=1"}')
    written = model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    fields, tensors = read(tmp_path / "model.gguf")
    assert written.architecture == "deci" and fields["deci.attention.head_count"] == [2, 4]
    assert tensors["blk.0.attn_q.weight"].shape == (32, 64) and tensors["blk.1.ffn_gate.weight"].shape == (96, 64)


def test_heads_of_which_a_part_is_turned_are_padded(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = optimized(decoder("phi3", 140, layers=2, rope_parameters=rope), "prune-heads{keep=0.5,scope=layer}")
    written = model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    fields, tensors = read(tmp_path / "model.gguf")
    assert written.architecture == "phi3" and fields["phi3.rope.dimension_count"] == 8
    # Two query heads and one key/value head of 16 features are left, of four and two.
    fused, kept = tensors["blk.0.attn_qkv.weight"], model.program.weights()["model.layers.0.self_attn.qkv_proj.weight"]
    assert torch.equal(fused[:32], kept[:32]) and not fused[32:64].any()
    assert torch.equal(fused[64:80], kept[32:48]) and not fused[80:96].any()
    assert not tensors["blk.0.attn_output.weight"][:, 32:].any()


def test_gpt2_is_transposed_and_pruned_heads_are_padded(tmp_path):
    passes = 'prune-heads{keep=0.5},prune-neurons{amounts="transformer.h.0=32"}'
    model = optimized(decoder("gpt2", 140, layers=2), passes)
    written = model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    fields, tensors = read(tmp_path / "model.gguf")
    weights = model.program.weights()
    assert written.architecture == "gpt2" and "output.weight" not in tensors
    assert fields["gpt2.attention.head_count"] == 4 and fields["gpt2.feed_forward_length"] == 96
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    kept, bias = (weights[f"transformer.h.0.attn.c_attn.{leaf}"] for leaf in ("weight", "bias"))
    for at in range(3):
        rows, wanted = slice(64 * at, 64 * at + 32), slice(32 * at, 32 * at + 32)
        assert torch.equal(tensors["blk.0.attn_qkv.weight"][rows], kept.T[wanted])
        assert torch.equal(tensors["blk.0.attn_qkv.bias"][rows], bias[wanted])
        assert not tensors["blk.0.attn_qkv.weight"][64 * at + 32 : 64 * at + 64].any()
    assert torch.equal(tensors["blk.0.ffn_down.weight"][:, :32], weights["transformer.h.0.mlp.c_proj.weight"].T)
    assert torch.equal(tensors["position_embd.weight"], weights["transformer.wpe.weight"])


def test_integers_of_transposed_weights_stay(tmp_path):
    model = optimized(decoder("gpt2", 140, layers=1), "quantize{scheme=int4-weight,symmetric=true}")
    written = model.export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    assert written.types["Q4_0"] == 4
    _, tensors = read(tmp_path / "model.gguf")
    quantizers = {str(node.args[0].target): node for node in model.program.nodes(fake_quantize)}
    for name, leaf in (("attn.c_attn", "attn_qkv"), ("mlp.c_proj", "ffn_down")):
        node = quantizers[f"transformer.h.0.{name}.weight"]
        operands = [model.program.weight(str(operand.target)).detach() for operand in node.all_input_nodes]
        assert torch.equal(tensors[f"blk.0.{leaf}.weight"], fake_quantize(*operands, **node.kwargs).T)


@pytest.mark.slow
def test_gpt2_read_from_a_file_is_written_with_its_blocks(tmp_path):
    tokenizer = byte_level()
    # transformers reads GPT-2 with these sizes alone.
    model = decoder("gpt2", len(tokenizer), layers=1, intermediate_size=256, max_position_embeddings=1024)
    first = optimized(model, "quantize{scheme=int8-weight}")
    first.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer)
    again = optimized(load(str(tmp_path), with_inputs=False).model)
    (tmp_path / "again").mkdir()
    written = again.export_gguf(tmp_path / "again" / "model.gguf")
    assert written.types["Q8_0"] == 4
    old, new = (
        {item.name: torch.from_numpy(item.data.copy()) for item in gguf.GGUFReader(str(path)).tensors}
        for path in (tmp_path / "model.gguf", tmp_path / "again" / "model.gguf")
    )
    for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down"):
        assert torch.equal(new[f"blk.0.{name}.weight"], old[f"blk.0.{name}.weight"]), name


def test_texts_of_phi3_end_where_its_window_does():
    for window, context in ((None, 256), (100, 100), (1000, 256)):
        config = transformers.Phi3Config(max_position_embeddings=256, sliding_window=window, pad_token_id=0)
        writer = gguf.GGUFWriter(None, "phi3")
        describe(writer, config, Sizes((32,), (32,), (64,)))
        fields = writer.kv_data[0]
        assert fields["phi3.context_length"].value == context
        assert fields["phi3.attention.sliding_window"].value == (window or 0)


def test_long_and_short_frequencies_are_written(tmp_path):
    model = decoder("phi3", 140, layers=1, rope_parameters=LONGROPE, original_max_position_embeddings=64)
    optimized(model).export_gguf(tmp_path / "model.gguf", tokenizer=byte_level())
    fields, tensors = read(tmp_path / "model.gguf")
    assert torch.equal(tensors["rope_factors_long.weight"], torch.arange(1.0, 9.0))
    assert torch.equal(tensors["rope_factors_short.weight"], torch.ones(8))
    assert fields["phi3.rope.scaling.original_context_length"] == 64
    # sqrt(1 + log(256 / 64) / log(64)), as the paper has it.
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx((4 / 3) ** 0.5)


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("gpt2", {"activation_function": "relu"}, "has activation_function='gelu_new', and this model 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "has scale_attn_by_inverse_layer_idx=False, and this model True"),
        ("phi3", {"hidden_act": "gelu", "pad_token_id": 0}, "the graph 'phi3' of llama.cpp has hidden_act='silu'"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(family, fields, sentence):
    with pytest.raises(UnsupportedError, match=sentence):
        family_of(transformers.CONFIG_MAPPING[family](**fields))


def test_groups_that_do_not_fill_the_residual_stream_are_refused():
    config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=1)
    with pytest.raises(
        UnsupportedError, match="which are 4; groups of 3 query heads for each key/value head do not divide them"
    ):
        fit({}, Sizes((3,), (1,), (32,)), FAMILIES["gpt2"], config)


def test_learned_positions_stay_in_float32_and_fused_projections_get_a_bit():
    table = torch.ones(4, 256, dtype=torch.float16)
    assert encoded("position_embd.weight", table, "f16")[0] == "F32"
    assert type_of("position_embd.weight", 256, "q4_k", 2) is None
    kinds = [type_of("blk.0.attn_qkv.weight", 256, types, 2) for types in ("q4_k", "q4_k_m", "q5_k_m")]
    assert kinds == ["Q4_K", "Q5_K", "Q6_K"]


def test_name_tells_llama_cpp_to_drop_spaces_after_added_tokens():
    plain = read_vocabulary(byte_fallback(), None, 1000)
    assert plain.name_of_file("Phi3ForCausalLM") == "PhiForCausalLM"
    tokenizer = byte_fallback()
    added = [transformers.AddedToken(text, rstrip=drops, special=True) for text, drops in (("</s>", True), ("<|end|>", True))]
    tokenizer.add_tokens([*added, transformers.AddedToken("<|endoftext|>", special=True)])
    phi = read_vocabulary(tokenizer, None, 1000)
    assert phi.name_of_file("Phi3ForCausalLM") == "Phi3ForCausalLM" and phi.name_of_file("Mine") == "Phi-3 Mine"
    assert Vocabulary({}).name_of_file("my-phi-3") == "my-Phi"
