"""Decoders as OpenVINO's IR with a KV cache: openvino-genai generates the tokens of transformers from them."""

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
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.errors import ArtifactError, InputError, UnsupportedError
from tests.support.gguf_models import byte_level, decoder, optimized, save_checkpoint
from tests.support.neighbours import all_but_slow
from tests.support.refusals import check, table
from tests.support.written_decoders import INT4, INT8, PROMPT, PRUNED, VOCABULARY, Anchored, Backwards, small

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
STEPS = 24
LONG = [(7 * index * index + 3 * index) % 87 + 1 for index in range(40)]
"""A text longer than the sliding windows of 16 tokens."""
ELSEWHERE = """
import json, sys
import numpy as np
import openvino
import openvino_genai
folder, prompts, steps, options = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
pipeline = openvino_genai.LLMPipeline(folder, "CPU", **options)
config = openvino_genai.GenerationConfig()
config.do_sample, config.max_new_tokens, config.eos_token_id = False, steps, 0
longest = max(map(len, prompts))
ids = np.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
assert "lissom" not in sys.modules
print(json.dumps([list(tokens) for tokens in pipeline.generate(inputs, config).tokens]))
"""


def needs_genai() -> None:
    pytest.importorskip("openvino_genai", reason="openvino-genai is not installed: pip install 'lissom[openvino-genai]'")


def elsewhere(folder: Path, prompts: list[list[int]], **options: str) -> list[list[int]]:
    """The answers that openvino-genai generates in a process without Lissom."""
    command = [sys.executable, "-c", ELSEWHERE, str(folder), json.dumps(prompts), str(STEPS), json.dumps(F32 | options)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


def of_transformers(model: Any, prompt: list[int]) -> list[int]:
    given = torch.tensor([prompt])
    found = model.generate(given, max_new_tokens=STEPS, do_sample=False, attention_mask=torch.ones_like(given))
    return found[0, len(prompt) :].tolist()


def varied(family: str, **fields: Any) -> Any:
    """A decoder whose greedy tokens differ, because its LM head is not its embedding table; id 0 ends texts."""
    return decoder(family, VOCABULARY, tie_word_embeddings=False, eos_token_id=0, pad_token_id=0, **fields)


def read(folder: Path) -> Any:
    return openvino.Core().read_model(folder / "openvino_model.xml")


@pytest.mark.parametrize("family", all_but_slow(["gemma3_text", "llama", "qwen3"], "gemma3_text"))
def test_openvino_genai_generates_as_transformers_does(family, tmp_path):
    needs_genai()
    model = varied(family)
    written = optimized(model).export_openvino(tmp_path / "new")
    assert "16 greedy tokens equal to the program's, with either attention" in str(written)
    # Two float32 programs of three layers.
    assert written.relative_error < 2e-5
    prompts = [LONG, PROMPT]
    wanted = [of_transformers(model, prompt) for prompt in prompts]
    assert len(set(wanted[0])) > 10
    # Paged attention, where openvino-genai can, and the state of the IR; the shorter text is padded.
    assert elsewhere(tmp_path / "new", prompts) == wanted
    assert elsewhere(tmp_path / "new", prompts, ATTENTION_BACKEND="SDPA") == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "passes", "fields"),
    [
        ("mistral", "exact", {"sliding_window": 16}),
        ("gemma2", "exact", {"sliding_window": 16, "head_dim": 32}),
        ("qwen2", "exact", {}),
        ("qwen3", PRUNED + "," + INT4, {}),
        ("llama", 'prune-heads{amounts="model.layers.0=1"}', {}),
        ("llama", "low-rank{keep=0.5}", {}),
    ],
)
def test_openvino_genai_generates_as_the_program_does(family, passes, fields, tmp_path):
    needs_genai()
    found = optimized(varied(family, **fields), passes)
    found.export_openvino(tmp_path / "new")
    for text, prompt in zip(elsewhere(tmp_path / "new", [LONG, PROMPT]), (LONG, PROMPT), strict=True):
        (logits,) = found.program.run([torch.tensor([prompt + text])])
        wanted = logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        # A text that is shorter was ended by id 0, which is not in it or is its last.
        assert text == wanted


@pytest.mark.parametrize(
    ("passes", "types"),
    [(INT4, {"u4"}), pytest.param(INT8, {"i8"}, marks=pytest.mark.slow)],
)
def test_quantized_weights_stay_integers(passes, types, tmp_path):
    written = optimized(varied("gemma3_text"), passes).export_openvino(tmp_path / "new")
    assert written.notes[0].startswith("21 of 21 quantized layers run in integers: 21 products with integer weights")
    constants = [node for node in read(tmp_path / "new").get_ops() if node.get_type_name() == "Constant"]
    found = Counter(node.get_output_element_type(0).get_type_name() for node in constants)
    assert sum(found[kind] for kind in types) >= 21


def test_form_of_the_decoder(tmp_path):
    written = optimized(varied("gemma3_text")).export_openvino(tmp_path / "new")
    assert [layer.window for layer in written.layers] == [16, None, 16]
    assert str(written).startswith(
        "decoder with 3 layers of attention, 2 of them with a sliding window, several texts at a time; "
    )
    model = read(tmp_path / "new")
    assert [port.get_any_name() for port in model.inputs] == ["input_ids", "attention_mask", "position_ids", "beam_idx"]
    assert [port.get_any_name() for port in model.outputs] == ["logits"]
    kinds = Counter(node.get_type_name() for node in model.get_ops())
    assert kinds["ReadValue"] == kinds["Assign"] == 6
    # openvino-genai pages the attention of an IR that has one such operator, and loses windows (OpenVINO 2026.4).
    assert kinds["ScaledDotProductAttention"] == 0
    assert model.get_rt_info(["runtime_options", "KV_CACHE_PRECISION"]).astype(str) == "f32"
    assert {file.name for file in (tmp_path / "new").iterdir()} == {
        *("openvino_model.xml", "openvino_model.bin", "config.json", "generation_config.json")
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_reduced_precision(family, dtype, tmp_path):
    written = optimized(varied(family).to(dtype)).export_openvino(tmp_path / "new")
    # Roundings to 11 or 8 bits in three layers, in different order.
    assert written.relative_error < (1e-2 if dtype == torch.float16 else 0.08)
    assert read(tmp_path / "new").outputs[0].get_element_type().get_type_name() == "f32"


class Counted(transformers.LlamaForCausalLM):
    """Adds a number that grows along a text, whatever its positions are."""

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        found = super().forward(input_ids, **kwargs)
        count = torch.arange(input_ids.shape[1], device=input_ids.device)[:, None]
        found.logits = found.logits * (1 + count / 16)
        return found


def test_positions_that_all_texts_share_are_read_one_text_at_a_time(tmp_path):
    written = optimized(small(Counted)).export_openvino(tmp_path / "new")
    assert "decoder with 1 layers of attention, one text at a time" in str(written)
    assert not written.texts and written.relative_error < 2e-5  # two float32 programs of a layer
    assert [str(port.get_partial_shape()) for port in read(tmp_path / "new").inputs] == ["[1,?]", "[1,?]", "[1,?]", "[1]"]


@pytest.mark.slow
def test_tokenizer(tmp_path):
    needs_genai()
    tokenizer = byte_level()
    model = decoder("llama", len(tokenizer), layers=1)
    optimized(model).export_openvino(tmp_path / "new", tokenizer=tokenizer)
    assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "new").iterdir()
    }
    script = "import sys, json, openvino_genai as g; t = g.Tokenizer(sys.argv[1]); ids = t.encode('once upon').input_ids; "
    script += "print(json.dumps([ids.data[0].tolist(), t.decode(ids)[0]]))"
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path / "new")], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout.splitlines()[-1]) == [tokenizer("once upon")["input_ids"], "once upon"]


def test_not_compared_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    written = optimized(decoder("llama", VOCABULARY, layers=1)).export_openvino(tmp_path / "new")
    assert "not compared: openvino-genai, which is not installed" in str(written)
    assert written.relative_error < 2e-5  # two float32 programs of a layer


@pytest.mark.slow
def test_command_line_writes_a_decoder(tmp_path):
    save_checkpoint(tmp_path / "model")
    found = CliRunner().invoke(app, ["export", str(tmp_path / "model"), str(tmp_path / "ir"), "--format", "openvino"])
    assert found.exit_code == 0, found.output
    assert "decoder with 1 layers of attention" in found.output
    assert {"openvino_model.xml", "generation_config.json"} <= {path.name for path in (tmp_path / "ir").iterdir()}


def saved(model: Any, passes: str = "exact", folder: str = "new", **how: Any) -> Any:
    return optimized(model, passes).export_openvino(folder, **how)


def llama(passes: str = "exact", **how: Any) -> Any:
    return saved(decoder("llama", VOCABULARY, layers=1), passes, **how)


def captured(inputs: dict[str, torch.Tensor], **how: Any) -> Any:
    return lissom.optimize(decoder("llama", VOCABULARY, layers=1), inputs, checks="off", **how).export_openvino("new")


REFUSALS = {
    "an existing folder": (ArtifactError, "is not an artifact, so it is not replaced", lambda: llama(folder="full")),
    "W8A8": (UnsupportedError, "quantizes activations, at", lambda: llama("quantize{scheme=int8-dynamic}")),
    "mxfp4": (UnsupportedError, "a weight in fp4", lambda: llama("quantize{scheme=mxfp4-weight}")),
    "attention to later tokens": (
        UnsupportedError,
        "in 'model.layers.0.self_attn' cannot have a KV cache in OpenVINO: it sees later tokens",
        lambda: saved(small(Backwards)),
    ),
    "logits of the first token": (
        UnsupportedError,
        "with a KV cache in OpenVINO differs from Anchored",
        lambda: saved(small(Anchored)),
    ),
    "embeddings as inputs": (
        UnsupportedError,
        "calls a decoder with input_ids, attention_mask, position_ids, and LlamaForCausalLM reads 'inputs_embeds'",
        lambda: captured({"inputs_embeds": torch.randn(1, 12, 64)}),
    ),
    "fixed sizes": (
        UnsupportedError,
        "takes input_ids of [1, 12] alone",
        lambda: captured({"input_ids": torch.tensor([PROMPT])}, dynamic=False),
    ),
    "short texts": (
        UnsupportedError,
        "knows texts of 12 tokens at most, and a comparison takes 16",
        lambda: saved(decoder("llama", VOCABULARY, layers=1, max_position_embeddings=12)),
    ),
    "another tokenizer": (
        InputError,
        "the tokenizer has",
        lambda: saved(decoder("llama", 20, layers=1), tokenizer=byte_level()),
    ),
}


@table(REFUSALS)
def test_refusals_leave_nothing(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    check(refusal)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full" / "file").read_text() == "kept"


def test_nothing_is_left_of_a_folder_that_openvino_genai_refuses(tmp_path, monkeypatch):
    needs_genai()
    monkeypatch.setattr("lissom.export.openvino.decoder_folder._PIPELINES", ({"ATTENTION_BACKEND": "none"},))
    with pytest.raises(UnsupportedError, match="openvino-genai does not run the decoder of Llama") as caught:
        optimized(decoder("llama", VOCABULARY, layers=1)).export_openvino(tmp_path / "new")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_other_models_are_written_without_state(tmp_path):
    lissom.optimize(nn.Linear(2, 2), torch.ones(1, 2)).export_openvino(tmp_path / "new")
    assert not read(tmp_path / "new").get_sinks()
