"""Tests of `lissom generate`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

import lissom
from lissom.cli.main import app
from lissom.errors import LissomError
from lissom.frontends.checkpoints.gguf import keep_blocks
from lissom.frontends.models.huggingface import Checkpoint, find_directory
from lissom.frontends.models.sources import Source
from lissom.ops.native import missing_weight_quantized_kernel
from tests.support.hostile import seal
from tests.support.models import seeded
from tests.support.quantized_checkpoints import small_config, write

pytestmark = pytest.mark.usefixtures("shared_captures")
runner = CliRunner()


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    """A small causal language model with the tokenizer of MiniLM."""
    path = tmp_path_factory.mktemp("decoder")
    config = transformers.LlamaConfig(
        vocab_size=30522, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, eos_token_id=None
    )
    seeded(lambda: transformers.LlamaForCausalLM(config)).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(find_directory("minilm") / name, path)
    return str(path)


@pytest.fixture(scope="module")
def saved(decoder, tmp_path_factory) -> Path:
    """The decoder, compiled for two tokens after `one`: copy it before changing it."""
    path = tmp_path_factory.mktemp("saved") / "model"
    assert runner.invoke(app, ["generate", decoder, "one", "--max-new-tokens", "2", "--save", str(path)]).exit_code == 0
    return path


def test_generate_streams_text_and_says_how_fast(decoder, tmp_path):
    result = runner.invoke(app, ["generate", decoder, "one two", "--max-new-tokens", "5", "--save", str(tmp_path / "saved")])
    assert result.exit_code == 0, result.output
    assert "answer: 5 tokens, 4 of them in" in result.stderr and "tokens/s" in result.stderr
    again = runner.invoke(app, ["generate", str(tmp_path / "saved"), "one two", "--max-new-tokens", "5"])
    assert again.stdout == result.stdout and len(result.stdout.split()) >= 1
    drawn = ["generate", str(tmp_path / "saved"), "one two", "--temperature", "5", "--max-new-tokens", "5"]
    assert runner.invoke(app, drawn).stdout != again.stdout
    refused = runner.invoke(app, ["generate", str(tmp_path / "saved"), "one", "--passes", "quantize"])
    assert refused.exit_code == 2 and "do not go with" in refused.output


def test_generate_with_a_draft_gives_the_same_text(decoder, tmp_path):
    arguments = ["--max-new-tokens", "20"]
    plain = runner.invoke(app, ["generate", decoder, "one two one two", *arguments, "--fresh"])
    place = str(tmp_path / "saved")
    for draft in ("prompt-lookup", "quantize{scheme=int8-weight,embeddings=true}"):
        result = runner.invoke(app, ["generate", decoder, "one two one two", *arguments, "--draft", draft, "--save", place])
        assert result.exit_code == 0, result.output
        assert result.stdout == plain.stdout
        assert "tokens accepted" in result.stderr and "tokens per call" in result.stderr
        again = runner.invoke(app, ["generate", place, "one two one two", *arguments])
        assert again.stdout == plain.stdout and "tokens per call" in again.stderr
    other = runner.invoke(app, ["generate", place, "one two one two", *arguments, "--draft", "prompt-lookup"])
    assert other.stdout == plain.stdout and "tokens per call" in other.stderr
    refused = runner.invoke(app, ["generate", place, "one", "--draft", "quantize"])
    assert isinstance(refused.exception, LissomError) and "is no draft for a compiled decoder" in str(refused.exception)


def test_generate_says_that_every_token_costs_a_whole_forward(decoder, tmp_path):
    shutil.copytree(decoder, tmp_path / "model")
    config = transformers.OpenAIGPTConfig(vocab_size=30522, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    seeded(lambda: transformers.OpenAIGPTLMHeadModel(config)).save_pretrained(tmp_path / "model")
    result = runner.invoke(app, ["generate", str(tmp_path / "model"), "one two", "--max-new-tokens", "5"])
    told = "compiled without a KV cache, so that every token costs a forward over all 9 tokens: OpenAIGPTLMHeadModel"
    assert result.exit_code == 0, result.exception
    assert told in result.stderr


def test_generate_keeps_what_it_compiled(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_KEPT_DECODERS", "2")
    monkeypatch.setattr("lissom.generation.kept.cache_folder", lambda: tmp_path)
    copied = tmp_path / "model"
    shutil.copytree(decoder, copied)
    arguments = ["generate", str(copied), "one two", "--max-new-tokens", "5"]
    first, second = runner.invoke(app, arguments), runner.invoke(app, arguments)
    assert "is kept for the next time in" in first.stderr
    assert "was compiled before and kept in" in second.stderr
    assert first.stdout == second.stdout
    monkeypatch.setenv("LISSOM_KEPT_DECODERS", "some")
    error = runner.invoke(app, arguments).exception
    assert str(error) == "LISSOM_KEPT_DECODERS is 'some'; give the number of decoders to keep, 0 for none"


@pytest.mark.slow
def test_generate_compiles_anew_what_is_damaged_or_changed(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_KEPT_DECODERS", "2")
    monkeypatch.setattr("lissom.generation.kept.cache_folder", lambda: tmp_path)
    copied = tmp_path / "model"
    shutil.copytree(decoder, copied)
    arguments = ["generate", str(copied), "one two", "--max-new-tokens", "5"]
    assert "is kept for the next time in" in runner.invoke(app, arguments).stderr
    assert "kept" not in runner.invoke(app, [*arguments, "--fresh"]).stderr
    (place,) = (tmp_path / "decoders").iterdir()
    (place / "weights.safetensors").write_bytes(b"damaged")
    assert "is kept for the next time in" in runner.invoke(app, arguments).stderr
    for passes in ("quantize", "quantize{scheme=int8-weight}"):
        assert "is kept for the next time" in runner.invoke(app, [*arguments, "--passes", passes]).stderr
    assert len(list(place.parent.iterdir())) == 2 and not place.exists()
    (copied / "model.safetensors").touch()
    assert "is kept for the next time" in runner.invoke(app, arguments).stderr


def test_generate_reads_weights_of_gguf_file_as_they_are(decoder, tmp_path, monkeypatch):
    gguf_files, ways = pytest.importorskip("tests.support.gguf_files"), []
    if missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) is not None:
        pytest.skip("no kernel for stored integers here")
    gguf_files.write_llama(tmp_path / "model.gguf", size=2e-4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    keep_blocks(model, tmp_path / "model.gguf")
    model.generation_config.eos_token_id = None
    checkpoint = Checkpoint(model, transformers.AutoTokenizer.from_pretrained(decoder), {})

    def compile_generation(*args, passes, **options):
        ways.append(passes)
        return lissom.compile_generation(*args, passes=passes, **options)

    monkeypatch.setattr("lissom.generation.prompted.compile_generation", compile_generation)
    monkeypatch.setattr("lissom.generation.prompted.load", lambda _, **__: Source(model, {}, (), checkpoint))
    monkeypatch.setattr("lissom.generation.prompted.read_prompt", lambda *_: torch.tensor([[1, 5, 9]]))
    arguments = ["generate", "any", "text", "--max-new-tokens", "4"]
    told = "the weights stay as the file stores them (use-stored-weights); --passes exact computes with float32"
    first, second = runner.invoke(app, arguments), runner.invoke(app, [*arguments, "--passes", "exact"])
    assert told in first.stderr and told not in second.stderr
    assert ways[0] == "use-stored-weights" and first.stdout == second.stdout


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_generate_reads_weights_of_quantized_checkpoint_as_they_are(decoder, tmp_path, method):
    if missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) is not None:
        pytest.skip("no kernel for stored integers here")
    tokenizer = transformers.AutoTokenizer.from_pretrained(decoder)
    write(tmp_path, method, symmetric=False, config=small_config(vocabulary=max(64, len(tokenizer))))
    tokenizer.save_pretrained(tmp_path)
    arguments = ["generate", str(tmp_path), "one two", "--max-new-tokens", "4"]
    told = "the weights stay as the file stores them (use-stored-weights); --passes exact computes with float32"
    first, second = runner.invoke(app, arguments), runner.invoke(app, [*arguments, "--passes", "exact"])
    assert told in first.stderr and told not in second.stderr
    assert first.exit_code == second.exit_code == 0 and first.stdout == second.stdout


def test_generate_calibrates_on_texts(decoder, tmp_path):
    (tmp_path / "texts.txt").write_text("one two three\nfour five\n")
    options = ["--max-new-tokens", "5", "--passes", "quantize{scheme=int8-static}", "--data", str(tmp_path / "texts.txt")]
    assert "answer: 5 tokens" in runner.invoke(app, ["generate", decoder, "one two", *options]).stderr


def test_generate_trains_on_texts(decoder, tmp_path):
    (tmp_path / "texts.txt").write_text("one two three\nfour five\nsix seven\ntwo one\n")
    passes = "quantize{scheme=int4-weight,group=8},distill{steps=2}"
    options = ["--max-new-tokens", "5", "--goal", "memory", "--passes", passes, "--data", str(tmp_path / "texts.txt")]
    assert "answer: 5 tokens" in runner.invoke(app, ["generate", decoder, "one two", *options]).stderr


def test_generate_reports_text_that_ends_early(decoder, tmp_path):
    saved = str(tmp_path / "saved")
    runner.invoke(app, ["generate", decoder, "one two", "--max-new-tokens", "5", "--checks", "off", "--save", saved])
    # [CLS] one two [SEP], and an answer of five, of which the last is not read.
    result = runner.invoke(app, ["generate", saved, "one two", "--max-new-tokens", "7"])
    assert "9 tokens fit into the KV cache, so the answer ends after 6" in result.stderr
    assert "answer: 6 tokens" in result.stderr
    long = runner.invoke(app, ["generate", saved, "one " * 8]).exception
    assert str(long) == "the prompt is 10 tokens, and 9 can be read at most; shorten it"


@pytest.mark.slow  # Its forms are built and timed one after the other.
def test_generate_on_onnxruntime(decoder):
    pytest.importorskip("onnxruntime")
    arguments = ["generate", decoder, "one two", "--max-new-tokens", "5"]
    wanted = runner.invoke(app, arguments)
    found = runner.invoke(app, [*arguments, "--backend", "onnxruntime"])
    assert found.exit_code == 0, found.output
    assert found.stdout == wanted.stdout


@pytest.mark.parametrize(
    ("model", "prompt", "sentence"),
    [
        ("nowhere/at-all", "one", "'nowhere/at-all' "),
        (None, "one " * 2047, "the prompt is 2049 tokens, and 2048 can be read at most; shorten it"),
    ],
)
def test_generate_refuses_in_a_sentence(decoder, model, prompt, sentence):
    error = runner.invoke(app, ["generate", model or decoder, prompt]).exception
    assert isinstance(error, LissomError)
    assert str(error).startswith(sentence) and "\n" not in str(error)


def test_generate_needs_a_decoder():
    assert "BertModel does not generate" in str(runner.invoke(app, ["generate", "minilm", "one"]).exception)


@pytest.mark.slow
def test_generate_takes_an_encoder_decoder(tmp_path):
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "forced_eos_token_id": None}
    config = transformers.BartConfig(vocab_size=30522, d_model=16, max_position_embeddings=64, **sizes, **heads)
    seeded(lambda: transformers.BartForConditionalGeneration(config)).save_pretrained(tmp_path / "bart")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(find_directory("minilm") / name, tmp_path / "bart")
    saved = str(tmp_path / "saved")
    made = runner.invoke(app, ["generate", str(tmp_path / "bart"), "one two", "--max-new-tokens", "5", "--save", saved])
    assert made.exit_code == 0, made.output
    assert "prompt: 4 tokens" in made.stderr
    again = runner.invoke(app, ["generate", saved, "one two", "--max-new-tokens", "5"])
    assert again.exit_code == 0 and again.stdout == made.stdout


@pytest.mark.parametrize("found", ["two", [2, "two"], 2.5, True])
def test_generate_refuses_an_end_token_that_is_no_number(saved, tmp_path, found):
    path = tmp_path / "saved"
    shutil.copytree(saved, path)
    fields = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(fields | {"eos_token_id": found}))
    seal(path)
    error = runner.invoke(app, ["generate", str(path), "one", "--max-new-tokens", "2"]).exception
    assert isinstance(error, LissomError)
    assert "eos_token_id" in str(error)
