"""GGUF files of optimized decoders in llama.cpp itself: the same tokens as the program, and the same tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lissom
from lissom.compiler.ir.program import Program
from lissom.errors import UnsupportedError
from lissom.export.gguf import writer
from lissom.export.gguf.k_types import quantized, type_of
from tests.support.gguf_models import byte_fallback, byte_level, decoder, optimized

pytest.importorskip("gguf")
llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install 'lissom[llama-cpp]'")
pytestmark = pytest.mark.slow
NAMES = {"embed_tokens": "token_embd.weight", "lm_head": "output.weight"}
NAMES |= {"v_proj": "blk.{}.attn_v.weight", "down_proj": "blk.{}.ffn_down.weight"}
STEPS = 12
PRUNED = "prune-layers{keep=0.67},prune-heads{keep=0.5},prune-neurons{keep=0.5}"
UNIFORM = "prune-layers{keep=0.67},prune-heads{keep=0.5,scope=layer},prune-neurons{keep=0.5,scope=layer}"
WIDTHS = 'prune-neurons{amounts="model.layers.0=32,model.layers.1=64"}'


GPT2_WIDTHS = 'prune-neurons{amounts="transformer.h.0=32,transformer.h.1=64"}'
HALF_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
# Both add in other orders, in float32. GELU of ggml is a table of float16 numbers, 2^-11, in every layer of GPT-2.
TOLERANCES = {"gpt2": 5e-3}


def serve(path: Path) -> Any:
    """llama.cpp with the file, in float32 where the file is."""
    options = llama.CommonParams()
    options.model.path = str(path)
    options.n_ctx, options.n_parallel, options.warmup = 128, 1, False
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama.Server(options)


def continued(server: Any, prompt: object, steps: int = STEPS) -> tuple[list[int], list[float]]:
    """The likeliest tokens after a prompt, and their log probabilities."""
    request = {"prompt": prompt, "n_predict": steps, "temperature": 0, "ignore_eos": True, "n_probs": 1}
    found = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
    return [item["id"] for item in found], [item["logprob"] for item in found]


def greedy(program: Program, prompt: Sequence[int], never: int) -> tuple[list[int], list[float]]:
    """The same of the program, without a KV cache. never: the token that ends texts."""
    ids, found = list(prompt), []
    for _ in range(STEPS):
        (logits,) = program.run([torch.tensor([ids])])
        assert isinstance(logits, torch.Tensor)
        last = logits[0, -1].float().log_softmax(-1)
        last[never] = -torch.inf
        ids.append(int(last.argmax()))
        found.append(float(last.max()))
    return ids[len(prompt) :], found


@pytest.mark.parametrize(
    ("family", "passes", "graph", "fields"),
    [
        ("llama", PRUNED, "deci", {}),
        ("llama", UNIFORM, "llama", {}),
        ("llama", WIDTHS, "deci", {"tie_word_embeddings": True}),
        ("llama", 'prune-heads{amounts="model.layers.0=1"}', "deci", {}),
        ("llama", "prune-layers{keep=0.67,part=attention}", "deci", {}),
        ("llama", "exact", "llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        ("mistral", WIDTHS, "deci", {}),
        ("qwen2", WIDTHS, "qwen2", {}),
        ("qwen2", "prune-heads{keep=0.5,scope=layer}", "llama", {}),
        ("qwen3", UNIFORM, "qwen3", {}),
        ("qwen3", WIDTHS, "openelm", {"tie_word_embeddings": True}),
        ("qwen3", WIDTHS, "qwen3", {"tie_word_embeddings": False}),
        ("gemma3_text", "prune-heads{keep=0.5,scope=layer}," + WIDTHS, "gemma3", {"layers": 4}),
        ("gemma3_text", 'prune-layers{amounts="model.layers.2=0,model.layers.3=0"}', "gemma3", {"layers": 4}),
        ("phi3", "exact", "phi3", {"tie_word_embeddings": True}),
        ("phi3", UNIFORM, "llama", {}),
        ("phi3", PRUNED, "deci", {}),
        ("phi3", PRUNED, "phi3", HALF_TURNED),
        ("gpt2", "exact", "gpt2", {"tie_word_embeddings": False}),
        ("gpt2", PRUNED, "gpt2", {}),
        ("gpt2", UNIFORM, "gpt2", {}),
        ("gpt2", GPT2_WIDTHS, "gpt2", {}),
        ("gpt2", "prune-layers{keep=0.67,part=attention}", "gpt2", {}),
        ("gpt2", "prune-layers{keep=0.67,part=feed-forward}", "gpt2", {}),
    ],
)
def test_llama_cpp_continues_a_text_as_the_program_does(family, passes, graph, fields, tmp_path):
    tokenizer = byte_level()
    found = optimized(decoder(family, len(tokenizer), **fields), passes)
    written = found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer)
    assert written.architecture == graph and set(written.types) == {"F32"}
    assert written.difference is not None and written.difference < TOLERANCES.get(family, 1e-3)
    # Longer than the sliding window.
    prompt = [*range(40, 52), *[60] * 20]
    ids, losses = greedy(found.program, prompt, tokenizer.eos_token_id)
    again, told = continued(serve(tmp_path / "model.gguf"), prompt)
    assert again == ids
    assert told == pytest.approx(losses, abs=TOLERANCES.get(family, 1e-3))


def test_a_file_of_which_llama_cpp_computes_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "INTERLEAVED", ())  # queries and keys in an order that is not llama.cpp's
    tokenizer = byte_level()
    found = optimized(decoder("llama", len(tokenizer), initializer_range=0.2))
    sentence = r"log probabilities for the file of LlamaForCausalLM that differ by \d\S*, allowed \S+, so it is not written"
    with pytest.raises(UnsupportedError, match=sentence):
        found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not [*tmp_path.iterdir()]


def test_llama3_frequencies_are_written(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    tokenizer = byte_level()
    model = decoder("llama", len(tokenizer), rope_parameters={**rope, "original_max_position_embeddings": 64})
    found = optimized(model)
    found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer)
    prompt = list(range(40, 60))
    ids, losses = greedy(found.program, prompt, tokenizer.eos_token_id)
    assert continued(serve(tmp_path / "model.gguf"), prompt) == (ids, pytest.approx(losses, abs=1e-3))


@pytest.mark.parametrize(
    ("passes", "original", "graph"),
    [("exact", 64, "phi3"), ("exact", 256, "phi3"), (UNIFORM, 64, "llama"), (PRUNED, 256, "deci")],
)
def test_long_and_short_frequencies_are_read(passes, original, graph, tmp_path):
    """llama.cpp's context has 128 tokens: more or fewer than the original one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original}
    rope |= {"short_factor": [1 + 0.1 * at for at in range(8)], "long_factor": [2 + 0.5 * at for at in range(8)]}
    tokenizer = byte_level()
    model = decoder("phi3", len(tokenizer), rope_parameters=rope, original_max_position_embeddings=original)
    found = optimized(model, passes)
    assert found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer).architecture == graph
    prompt = [*range(40, 52), *[60] * 20] * 3
    ids, losses = greedy(found.program, prompt, tokenizer.eos_token_id)
    assert continued(serve(tmp_path / "model.gguf"), prompt) == (ids, pytest.approx(losses, abs=1e-3))


def check_first_loss(program: Program, end: int, file: Path) -> None:
    """Compare the loss of the first token after a prompt, for types that llama.cpp multiplies with int8 activations."""
    prompt = list(range(40, 60))
    _, losses = greedy(program, prompt, end)
    _, told = continued(serve(file), prompt, 1)
    assert told[0] == pytest.approx(losses[0], abs=0.1)


@pytest.mark.parametrize(
    ("family", "scheme", "kind", "matrices"),
    [
        ("llama", "int8-weight", "Q8_0", 7),
        ("llama", "int4-weight", "Q4_1", 7),
        ("llama", "int4-weight,symmetric=true", "Q4_0", 7),
        ("phi3", "int4-weight", "Q4_1", 4),
        ("gpt2", "int8-weight", "Q8_0", 4),
        ("gpt2", "int4-weight", "Q4_1", 4),
    ],
)
def test_quantized_weights_are_read(family, scheme, kind, matrices, tmp_path):
    tokenizer = byte_level()
    found = optimized(decoder(family, len(tokenizer)), f"quantize{{scheme={scheme}}}")
    written = found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer)
    # In each of three layers.
    assert written.types[kind] == 3 * matrices
    check_first_loss(found.program, tokenizer.eos_token_id, tmp_path / "model.gguf")


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_llama_cpp_splits_texts_as_the_tokenizer_does(build, tmp_path):
    tokenizer = build()
    found = optimized(decoder("llama", len(tokenizer), layers=1))
    found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer)
    server = serve(tmp_path / "model.gguf")
    for text in ("the quick brown dog", "fox, fox jumps", "jumping foxes  bark"):
        after, losses = continued(server, tokenizer(text).input_ids, 4)
        assert continued(server, text, 4) == (after, pytest.approx(losses, abs=1e-4))


def test_gemma_is_written_with_its_own_blocks_and_vocabulary(tmp_path):
    gemma = lissom.frontends.models.huggingface.load("gemma3-270m")
    found = lissom.optimize(gemma.model, gemma.example_inputs, passes="exact", checks="off")
    written = found.export_gguf(tmp_path / "model.gguf")
    (file,) = lissom.frontends.models.huggingface.find_directory("gemma3-270m").glob("*.gguf")
    assert written.megabytes == pytest.approx(file.stat().st_size / 1e6, rel=0.01)
    prompt = "The capital of France is"
    assert continued(serve(tmp_path / "model.gguf"), prompt) == continued(serve(file), prompt)


@pytest.mark.parametrize("types", ["q4_k", "q5_k", "q6_k", "q4_k_m", "q5_k_m"])
def test_k_types_are_read(types, tmp_path):
    tokenizer = byte_level()
    found = optimized(decoder("llama", len(tokenizer), hidden_size=256, layers=1, intermediate_size=512, initializer_range=0.1))
    written = found.export_gguf(tmp_path / "model.gguf", tokenizer=tokenizer, types=types)
    assert sum(count for kind, count in written.types.items() if kind.endswith("_K")) == 9
    # The program with the weights of the file: llama.cpp stores the two halves of rotary features in turn.
    for name, weight in found.program.weights().items():
        if weight.dim() == 2:
            leaf = NAMES.get(name.split(".")[-2], "")
            kind = type_of(leaf.format(*name.split(".")[2:3]), weight.shape[1], types, 1)
            weight.data.copy_(quantized(weight.detach(), str(kind)).value())
    check_first_loss(found.program, tokenizer.eos_token_id, tmp_path / "model.gguf")


@pytest.mark.parametrize("build", [byte_level, byte_fallback])
def test_pruned_vocabulary_splits_texts_as_the_rewritten_tokenizer(build, tmp_path):
    tokenizer = build()
    model = decoder("llama", len(tokenizer), layers=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model").eval()
    texts = ["the quick brown dog", "fox, fox jumps", "jumping foxes  bark"]
    data = [{"input_ids": torch.tensor([tokenizer(text).input_ids])} for text in texts[:1]]
    found = lissom.optimize(
        model, data[0], passes=f"prune-vocabulary{{keep={len(tokenizer) - 8},ids=tokenizer}}", data=data, checks="off"
    )
    found.export_gguf(tmp_path / "model.gguf")
    small = lissom.pruned_tokenizer(found, tokenizer)
    assert len(small) < len(tokenizer)
    server = serve(tmp_path / "model.gguf")
    for text in texts:
        after, losses = continued(server, small(text).input_ids, 4)
        assert continued(server, text, 4) == (after, pytest.approx(losses, abs=1e-4))
