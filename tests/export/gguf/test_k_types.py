"""Weights quantized to K types: read by the package gguf, and their error beside that of llama.cpp's quantizer."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lissom.errors import UnsupportedError
from lissom.export.gguf.k_types import check_types, quantized, type_of
from tests.support.gguf_models import byte_level, decoder, optimized
from tests.support.models import normal

gguf = pytest.importorskip("gguf")
KINDS = ("Q4_K", "Q5_K", "Q6_K")


def weights() -> dict[str, torch.Tensor]:
    """Matrices [24, 512]: of normal values, with outliers, of one sign, of zeros."""
    plain = normal(24, 512, seed=3) * 0.02
    return {"normal": plain, "outliers": plain**3 * 1e4, "positive": plain.abs() + 0.1, "negative": -plain.abs() - 0.1}


@pytest.mark.parametrize("kind", [*KINDS, "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_are_read_by_gguf_to_the_bit(kind):
    for weight in (*weights().values(), torch.zeros(2, 256)):
        found = quantized(weight, kind)
        read = torch.from_numpy(gguf.dequantize(found.data.numpy(), gguf.GGMLQuantizationType[kind]))
        assert torch.equal(found.value(), read) and read.shape == weight.shape
        # Of 16 levels, the worst case here, the error is about 1/30 of the range of a group.
        assert float((read - weight).norm()) <= 0.1 * float(weight.norm())


@pytest.mark.parametrize("kind", [*KINDS, "Q5_0", "Q5_1"])
def test_error_is_no_larger_than_that_of_llama_cpp(kind):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'lissom[llama-cpp]'")
    convert = getattr(ctypes.CDLL(llama.xllamacpp.__file__), f"quantize_{kind[0].lower()}{kind[1:]}")
    convert.restype, convert.argtypes = ctypes.c_size_t, [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]
    for name, weight in weights().items():
        ours = quantized(weight, kind)
        data = torch.empty_like(ours.data)
        assert convert(weight.data_ptr(), data.data_ptr(), *weight.shape, None) == data.numel()
        theirs = torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
        assert float((ours.value() - weight).norm()) <= float((theirs - weight).norm()), name


def test_types_of_matrices():
    assert type_of("blk.0.attn_q.weight", 512, "q4_k_m", 16) == "Q4_K"
    assert [type_of(f"blk.{at}.ffn_down.weight", 512, "q4_k_m", 16) == "Q6_K" for at in range(6)] == [1, 1, 0, 0, 1, 0]
    assert type_of("token_embd.weight", 512, "q5_k_m", 16) == "Q6_K" and type_of("token_embd.weight", 512, "q5_k", 16) == "Q5_K"
    assert [type_of("token_embd.weight", 640, types, 16) for types in ("q4_k", "q5_k", "q6_k", "q4_k_m")] == [
        *("Q5_0", "Q5_1", "Q8_0", "Q8_0")
    ]
    assert type_of("token_embd.weight", 600, "q4_k", 16) is None


def test_bad_input_is_refused():
    with pytest.raises(UnsupportedError, match="types= is 'q3_k'; choose q4_k, q5_k, q6_k, q4_k_m, q5_k_m"):
        check_types("q3_k")
    with pytest.raises(UnsupportedError, match="values that are not finite, which Q4_K cannot hold"):
        quantized(torch.full((1, 256), torch.inf), "Q4_K")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("types", "kinds", "small"),
    [("q4_k", {"Q4_K"}, {"Q5_0": 3}), ("q5_k_m", {"Q5_K", "Q6_K"}, {"Q5_1": 2, "Q8_0": 1}), ("q6_k", {"Q6_K"}, {"Q8_0": 3})],
)
def test_file_has_the_types(types, kinds, small, tmp_path):
    tokenizer = byte_level()
    found = optimized(decoder("qwen2", len(tokenizer), hidden_size=256, intermediate_size=96))
    written = found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, types=types)
    # The rows of ffn_down have 96 weights, in each of three layers.
    assert set(written.types) == {*kinds, *small, "F32"} and small.items() <= dict(written.types).items()
    tensors = {item.name: item for item in gguf.GGUFReader(str(tmp_path / "model.gguf")).tensors}
    up = tensors["blk.1.ffn_up.weight"]
    wanted = quantized(found.program.weights()["model.layers.1.mlp.up_proj.weight"], types.removesuffix("_m").upper())
    assert torch.equal(torch.from_numpy(up.data.copy()).view(96, -1), wanted.data)


@pytest.mark.slow
def test_integers_of_passes_stay(tmp_path):
    tokenizer = byte_level()
    found = optimized(decoder("llama", len(tokenizer), hidden_size=256), "quantize{scheme=int4-weight}")
    written = found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, types="q6_k")
    assert written.types["Q4_1"] == 21 and set(written.types) == {"Q4_1", "Q6_K", "F32"}
