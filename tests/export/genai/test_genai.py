"""Folders for ONNX Runtime GenAI: the decoder in ONNX, its configuration, and the tokens that the library generates from it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.ops.pattern import UNBOUNDED, Condition, Pattern
from tests.support.gguf_models import byte_level, decoder, optimized
from tests.support.models import seeded
from tests.support.neighbours import all_but_slow
from tests.support.refusals import check, table
from tests.support.written_decoders import INT4, INT8, PROMPT, PRUNED, VOCABULARY, Anchored, Backwards, small

onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install 'lissom[onnx]'")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed: pip install 'lissom[onnx]'")
# They import ONNX.
from lissom.export.causal_lm.attention import window_of  # noqa: E402
from lissom.export.genai.reload import generate  # noqa: E402

INPUTS = ("input_ids", "attention_mask", "position_ids")
STEPS = 24
REWOUND = """
import json, sys
import numpy as np
import onnxruntime_genai as genai
model = genai.Model(sys.argv[1])
params = genai.GeneratorParams(model)
params.set_search_options(max_length=200, min_length=200)
generator = genai.Generator(model, params)
texts = []
generator.append_tokens(np.array([list(range(3, 43))], np.int32))
while not generator.is_done():
    generator.generate_next_token()
texts.append(generator.get_sequence(0).tolist())
generator.rewind_to(60)
generator.append_tokens(np.array([[7, 8, 9]], np.int32))
for _ in range(20):
    generator.generate_next_token()
texts.append(generator.get_sequence(0).tolist())
print(json.dumps(texts))
"""
ELSEWHERE = """
import json, sys
import numpy as np
import onnxruntime_genai as genai
folder, prompt, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = genai.Model(folder)
params = genai.GeneratorParams(model)
params.set_search_options(max_length=length)
generator = genai.Generator(model, params)
generator.append_tokens(np.array([prompt], np.int32))
while not generator.is_done():
    generator.generate_next_token()
assert "lissom" not in sys.modules
print(json.dumps(generator.get_sequence(0).tolist()))
"""
OTHERS = ["llama", "qwen3", "mistral", "qwen2", "gemma2", "phi3"]


def needs_genai() -> None:
    pytest.importorskip("onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install 'lissom[genai]'")


def elsewhere(folder: Path, prompt: list[int], length: int) -> list[int]:
    """The text that ONNX Runtime GenAI generates in a process without Lissom."""
    command = [sys.executable, "-c", ELSEWHERE, str(folder), json.dumps(prompt), str(length)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def greedy(program: Any, prompt: list[int], length: int) -> list[int]:
    """The likeliest text of a program without a KV cache, up to id 0, which ends texts."""
    ids, token = list(prompt), -1
    while len(ids) < length:
        (logits,) = program.run([torch.tensor([ids])])
        token = int(logits[0, -1].argmax())
        if token == 0:
            break
        ids.append(token)
    return ids


def graph(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def attributes(node: Any) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.parametrize("family", ["gemma3_text", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_genai_generates_as_transformers_does(family, tmp_path):
    needs_genai()
    # Id 0 ends texts; the text is longer than Gemma's window of 16 tokens.
    model = decoder(family, VOCABULARY, eos_token_id=0, pad_token_id=0)
    written = optimized(model).save_genai(tmp_path / "new")
    assert "16 greedy tokens equal to the program's" in str(written)
    given = torch.tensor([PROMPT])
    wanted = model.generate(given, max_new_tokens=STEPS, do_sample=False, attention_mask=torch.ones_like(given))[0].tolist()
    assert len(wanted) > 18
    assert elsewhere(tmp_path / "new", PROMPT, len(PROMPT) + STEPS) == wanted


@pytest.mark.parametrize(
    ("family", "passes", "kinds"),
    [
        ("llama", INT4, {"int4 in blocks of 32": 21}),
        pytest.param(
            "llama",
            "quantize{scheme=int4-weight,symmetric=true,group=16}",
            {"int4 in blocks of 16": 21},
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", INT8, {"int8 in blocks of 32": 21}, marks=pytest.mark.slow),
        pytest.param(
            "qwen3",
            "quantize{scheme=int8-weight,symmetric=false,lm_head=true}",
            {"int8 in blocks of 32": 22},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gemma3_text",
            'quantize{scheme=int8-weight,schemes="*mlp*=int4-weight"}',
            {"int4 in blocks of 32": 9},
            marks=pytest.mark.slow,
        ),
        pytest.param("llama", PRUNED, {}, marks=pytest.mark.slow),
        pytest.param("qwen3", PRUNED + "," + INT4, {}, marks=pytest.mark.slow),
        pytest.param("llama", 'prune-heads{amounts="model.layers.0=1"}', {}, marks=pytest.mark.slow),
        pytest.param("llama", "low-rank{keep=0.5}", {}, marks=pytest.mark.slow),
        pytest.param("mistral", "exact", {}, marks=pytest.mark.slow),
    ],
)
def test_genai_generates_as_the_program_does(family, passes, kinds, tmp_path):
    found = optimized(decoder(family, VOCABULARY, eos_token_id=0, pad_token_id=0), passes)
    written = found.save_genai(tmp_path / "new")
    assert kinds.items() <= written.products.items()
    needs_genai()
    length = len(PROMPT) + STEPS
    assert elsewhere(tmp_path / "new", PROMPT, length) == greedy(found.program, PROMPT, length)


@pytest.mark.slow
def test_texts_of_many_windows_and_rewound_ones(tmp_path):
    needs_genai()
    found = optimized(decoder("gemma3_text", VOCABULARY, eos_token_id=0, pad_token_id=0), INT4)
    found.save_genai(tmp_path / "new")
    command = [sys.executable, "-c", REWOUND, str(tmp_path / "new")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    texts = json.loads(ended.stdout.splitlines()[-1])
    assert [len(text) for text in texts] == [200, 83]
    for text, prompt in zip(texts, (40, 63), strict=True):
        (logits,) = found.program.run([torch.tensor([text])])
        logits[..., 0] = -torch.inf  # ends texts, which are to have their full length
        assert logits[0, prompt - 1 : -1].argmax(-1).tolist() == text[prompt:]


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_weights_and_attention_are_operators_of_onnx_runtime(bits, tmp_path):
    found = optimized(decoder("gemma3_text", VOCABULARY), INT4 if bits == 4 else INT8)
    written = found.save_genai(tmp_path / "new")
    nodes = graph(tmp_path / "new").node
    count = Counter(node.op_type for node in nodes)
    assert count["GroupQueryAttention"] == 3 and not {"Softmax", "Attention", "ScatterND"} & {*count}
    layers = [attributes(node) for node in nodes if node.op_type == "GroupQueryAttention"]
    assert [layer.get("local_window_size") for layer in layers] == [16, None, 16]
    assert [layer.window for layer in written.layers] == [16, None, 16]
    products = [attributes(node) for node in nodes if node.op_type == "MatMulNBits"]
    in_attention_and_mlp = [product for product in products if product["bits"] == bits]
    assert len(in_attention_and_mlp) >= 21
    assert {(product["block_size"], product["accuracy_level"]) for product in products} == {(32, 0)}


def test_configuration_and_tokenizer(tmp_path):
    tokenizer = byte_level()
    model = decoder("qwen3", len(tokenizer), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model.generation_config.eos_token_id = [3, 4]
    model.generation_config.temperature = 0.7
    optimized(model).save_genai(tmp_path / "new", tokenizer=tokenizer)
    content = json.loads((tmp_path / "new" / "genai_config.json").read_text(encoding="utf-8"))
    described, search = content["model"], content["search"]
    assert described["type"] == "qwen3" and described["vocab_size"] == len(tokenizer)
    assert (described["eos_token_id"], described["pad_token_id"], described["context_length"]) == ([3, 4], 3, 256)
    sizes = ("head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size")
    assert [described["decoder"][size] for size in sizes] == [32, 4, 2, 3, 64]
    assert search["past_present_share_buffer"] and search["temperature"] == 0.7 and search["max_length"] == 256
    names = {file.name for file in (tmp_path / "new").iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    needs_genai()
    script = "import sys, json, onnxruntime_genai as g; t = g.Tokenizer(g.Model(sys.argv[1])); "
    script += "print(json.dumps(t.encode('once upon').tolist()))"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "new")], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == tokenizer("once upon")["input_ids"]


@pytest.mark.slow
def test_the_tokenizer_names_the_end_of_texts_where_the_model_does_not(tmp_path):
    tokenizer = byte_level()
    model = decoder("llama", len(tokenizer), bos_token_id=None, eos_token_id=None)
    optimized(model).save_genai(tmp_path / "new", tokenizer=tokenizer)
    content = json.loads((tmp_path / "new" / "genai_config.json").read_text(encoding="utf-8"))
    assert content["model"]["eos_token_id"] == tokenizer.eos_token_id
    written = optimized(model).save_genai(tmp_path / "other")
    assert "no id is known to end texts" in str(written) and "without a tokenizer" in str(written)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["input_ids,attention_mask", "input_ids", ",".join(INPUTS)])
def test_inputs_that_the_program_was_captured_with(names, tmp_path):
    ids = torch.tensor([PROMPT, PROMPT])
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    positions = (padding.cumsum(1) - 1).clamp_min(0)
    given = {"input_ids": ids, "attention_mask": padding, "position_ids": positions}
    inputs = {name: given[name] for name in names.split(",")}
    found = lissom.optimize(decoder("gemma2", VOCABULARY), inputs, checks="off")
    found.save_genai(tmp_path / "new")
    read = [value.name for value in graph(tmp_path / "new").input]
    assert read[0] == "input_ids" and {"attention_mask", "position_ids", "past_key_values.2.value"} <= {*read}


def test_not_compared_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    written = optimized(decoder("llama", VOCABULARY)).save_genai(tmp_path / "new")
    assert "not compared: ONNX Runtime GenAI, which is not installed" in str(written)
    assert written.relative_error < 2e-5  # two float32 programs of three layers


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def bert() -> Any:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return seeded(lambda: transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=32)))


def saved(model: Any, passes: str = "exact", folder: str = "nowhere/new", **how: Any) -> Any:
    return optimized(model, passes).save_genai(folder, **how)


def llama(passes: str = "exact", **how: Any) -> Any:
    return saved(decoder("llama", VOCABULARY, layers=1), passes, **how)


def captured(inputs: dict[str, torch.Tensor], **how: Any) -> Any:
    return lissom.optimize(decoder("llama", VOCABULARY, layers=1), inputs, checks="off", **how).save_genai("new")


IDS = torch.tensor([PROMPT])
REFUSALS = {
    "an encoder": (
        UnsupportedError,
        "BertModel is none; CompiledModel.export_onnx writes encoders",
        lambda: saved(bert(), folder="new"),
    ),
    "a family without a type": (UnsupportedError, "has no type for models of type 'gpt2'", lambda: saved(gpt2(), folder="new")),
    "no model of transformers": (
        UnsupportedError,
        "has no folder for ONNX Runtime GenAI",
        lambda: lissom.optimize(nn.Linear(2, 2), torch.ones(1, 2)).save_genai("new"),
    ),
    "no such parent": (ArtifactError, "there is no directory", llama),
    "an existing folder": (ArtifactError, "is not an artifact, so it is not replaced", lambda: llama(folder="full")),
    "an existing file": (ArtifactError, "is not an artifact", lambda: llama(folder="full/file")),
    "W8A8": (UnsupportedError, "quantizes activations", lambda: llama("quantize{scheme=int8-dynamic}", folder="new")),
    "fp8": (UnsupportedError, "quantizes activations", lambda: llama("quantize{scheme=fp8}", folder="new")),
    "mxfp4": (UnsupportedError, "is in fp4, and MatMulNBits", lambda: llama("quantize{scheme=mxfp4-weight}", folder="new")),
    "groups of 8": (
        UnsupportedError,
        "MatMulNBits takes groups of 16 neighbours and more, and it has 8",
        lambda: llama("quantize{scheme=int4-weight,group=8}", folder="new"),
    ),
    "bfloat16": (UnsupportedError, "lacks kernels of bfloat16", lambda: llama("cast{dtype=bf16}", folder="new")),
    "attention to later tokens": (
        UnsupportedError,
        "in 'model.layers.0.self_attn' cannot be GroupQueryAttention of ONNX Runtime: it sees later tokens",
        lambda: saved(small(Backwards), folder="new"),
    ),
    "logits of the first token": (
        UnsupportedError,
        "it depends on earlier tokens otherwise than by attention and positions",
        lambda: saved(small(Anchored), folder="new"),
    ),
    "embeddings as inputs": (
        UnsupportedError,
        "reads 'inputs_embeds'; call lissom.optimize with example inputs of these names",
        lambda: captured({"inputs_embeds": torch.randn(1, 12, 64)}),
    ),
    "fixed sizes": (UnsupportedError, "takes input_ids of [1, 12] alone", lambda: captured({"input_ids": IDS}, dynamic=False)),
    "short texts": (
        UnsupportedError,
        "knows texts of 12 tokens at most",
        lambda: saved(small(transformers.LlamaForCausalLM, max_position_embeddings=12), folder="new"),
    ),
    "another tokenizer": (
        InputError,
        "the tokenizer has",
        lambda: saved(decoder("llama", 20, layers=1), folder="new", tokenizer=byte_level()),
    ),
    "no tokenizer at all": (InputError, "give one of transformers", lambda: llama(folder="new", tokenizer="words")),
}


@table(REFUSALS)
def test_refusals_leave_nothing(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    check(refusal)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "kept"


@pytest.mark.parametrize("damage", all_but_slow(["genai_config.json", "model.onnx", "model.onnx.data"], "model.onnx"))
def test_a_damaged_folder_is_one_sentence(damage, tmp_path):
    needs_genai()
    optimized(decoder("llama", VOCABULARY, layers=1)).save_genai(tmp_path / "new")
    (tmp_path / "new" / damage).write_bytes(b"{")
    with pytest.raises(
        UnsupportedError, match="ONNX Runtime GenAI does not run the decoder of Llama in a fresh process"
    ) as caught:
        generate("Llama", tmp_path / "new", [PROMPT], 2, 32, shared=True)
    assert "\n" not in str(caught.value)


def test_windows_of_patterns():
    def band(low: int, high: int) -> Pattern:
        return Pattern(((Condition(-1, 1, low, high),),))

    assert window_of(band(-UNBOUNDED, 0)) is None
    assert window_of(band(-7, 0)) == 8
    for other in (band(-7, 1), Pattern(())):
        with pytest.raises(ValueError, match="neither causal nor a causal sliding window"):
            window_of(other)
