"""What checkpoints of compressed-tensors cannot say is refused, and nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lissom.errors import ArtifactError, UnsupportedError
from lissom.export.compressed_tensors.schemes import Inputs, LayerScheme, check_fused, check_loads
from lissom.frontends.checkpoints.compressed_tensors_config import Scheme
from lissom.frontends.models.huggingface import load
from tests.support.compressed_checkpoints import optimized
from tests.support.quantized_checkpoints import small_config, small_model, write
from tests.support.refusals import check

pytest.importorskip("compressed_tensors", reason="the package that writes these checkpoints")


class Own(transformers.LlamaForCausalLM):
    """A model that no fresh process knows."""


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 40}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes)).eval()


def scattered(folder: Path) -> Any:
    """A checkpoint of GPTQ whose groups are not of neighbours."""
    write(folder, "gptq", scattered=lambda columns, group: torch.randperm(columns).numpy() // group)
    return load(str(folder), with_inputs=False).model


def refused(passes: str, model: Any = None, **options: Any) -> Any:
    """A call that has to leave nothing behind in an empty folder."""

    def call(folder: Path) -> None:
        model_here = model(folder / "gptq") if model is scattered else model() if model is not None else None
        before = {*folder.iterdir()}
        try:
            optimized(passes, model_here).save_compressed(folder / "checkpoint", **options)
        finally:
            assert {*folder.iterdir()} == before

    return call


REFUSED: dict[str, tuple[str, Any]] = {
    "nothing quantized": ("has no quantized layers; add quantize", refused("exact")),
    "inputs in groups": ("int8 with a scale per group, which servers have", refused("quantize{scheme=int8-group}")),
    "int4 with inputs": ("int8 with a scale per group", refused("quantize{scheme=int4-dynamic}")),
    "residual": ("which is not the input of a quantized linear layer", refused("quantize{scheme=int8-dynamic,residual=true}")),
    "mxfp8": ("is in fp8 with scales in float8_e8m0fnu", refused("quantize{scheme=mxfp8-weight}")),
    "mxfp4": ("is in fp4 with scales in float8_e8m0fnu", refused("quantize{scheme=mxfp4-weight}")),
    "fused layers": (
        "q_proj' is in uint4 in groups of 32 and 'model.layers.0.self_attn.k_proj' in int8 per channel, and vLLM makes one",
        refused('quantize{scheme=int8-weight,schemes="*q_proj=int4-weight"}'),
    ),
    "fused, one not quantized": (
        "'model.layers.0.mlp.gate_proj' is in int8 per channel and 'model.layers.0.mlp.up_proj' in floating point",
        refused("quantize{scheme=int8-weight,skip=*up_proj}"),
    ),
    "schemes with zero points": (
        "transformers loads no checkpoint with several schemes (int8 per channel, uint4 in groups of 32)",
        refused('quantize{scheme=int8-weight,schemes="*mlp*=int4-weight"}'),
    ),
    "padding ends in a group": (
        "'model.layers.1.mlp.down_proj' is padded to 96 inputs like the widest layer, and its groups have 40",
        refused(
            'prune-neurons{amounts="model.layers.1=80"},quantize{scheme=int8-weight,granularity=group,group=40,only=*down_proj}'
        ),
    ),
    "other modules": (
        "and compressed-tensors quantizes the weights of nn.Linear alone",
        refused("quantize{scheme=int8-weight}", gpt2),
    ),
    "other KV cache": ("kv_cache= is 'int4'; choose fp8", refused("quantize{scheme=int8-weight}", kv_cache="int4")),
    "KV cache of an encoder": (
        "kv_cache= is for decoders of transformers, and BertForSequenceClassification takes no KV cache",
        refused("quantize{scheme=int8-weight}", bert, kv_cache="fp8"),
    ),
    "own class": (
        "Own is no class of transformers",
        refused("quantize{scheme=int8-weight}", lambda: Own(small_config()).eval()),
    ),
    "order of inputs": (
        "are sorted by groups, which compressed-tensors no longer stores",
        refused("use-stored-weights", scattered),
    ),
    "factors": (
        "a compressed-tensors checkpoint of LlamaForCausalLM cannot hold this program",
        refused("low-rank{rank=8,only=*mlp*},quantize{scheme=int8-weight,only=*self_attn*}"),
    ),
    "quantized factors": (
        "is no weight of LlamaForCausalLM",
        refused("low-rank{rank=8,only=*down_proj},quantize{scheme=int8-weight}"),
    ),
    "a table whose inputs are quantized": (
        "because it is an embedding table too; leave out embeddings=true",
        refused("quantize{scheme=int8-dynamic,embeddings=true}", lambda: small_model(small_config(tied=True)).float()),
    ),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name == "factors" else ()) for name in REFUSED])
def test_what_the_format_cannot_say_is_refused(tmp_path, name):
    sentence, call = REFUSED[name]
    check((UnsupportedError, sentence, lambda: call(tmp_path)))


def test_a_folder_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    found = optimized("quantize{scheme=int8-weight}")
    with pytest.raises(ArtifactError, match="exists and is not an artifact, so it is not replaced"):
        found.save_compressed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_written_that_no_library_loads(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UnsupportedError, match=r"needs compressed-tensors, .*: pip install 'lissom\[compressed-tensors\]'"):
        optimized("quantize{scheme=int8-weight}").save_compressed(tmp_path / "checkpoint")
    assert not [*tmp_path.iterdir()]


INT8 = Scheme(8, "int", "channel", True, None)
UINT4 = Scheme(4, "int", "group", False, 32)


def test_fused_layers_have_one_scheme():
    both = {f"layer.{name}_proj": LayerScheme(INT8, None) for name in "qkv"}
    check_fused(both, [*both, "layer.o_proj"])
    check_fused({}, [*both])
    with pytest.raises(UnsupportedError, match=r"'layer.q_proj' is in int8 per channel with inputs in int8 and 'layer.k_proj'"):
        check_fused({**both, "layer.q_proj": LayerScheme(INT8, Inputs("uint8", "token"))}, [*both])


def test_packed_zero_points_are_of_one_scheme():
    check_loads([LayerScheme(UINT4, None)] * 2)
    check_loads([LayerScheme(INT8, None), LayerScheme(INT8, Inputs("uint8", "token"))])
    with pytest.raises(UnsupportedError, match="choose symmetric=true"):
        check_loads([LayerScheme(UINT4, None), LayerScheme(INT8, None)])
