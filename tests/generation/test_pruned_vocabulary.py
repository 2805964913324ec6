"""Tests of generation with a pruned vocabulary: greedy tokens are those of the original with dropped logits masked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.errors import InputError, UnsupportedError
from lissom.generation.prompted import Request, compile_prompted
from tests.support.decoders import DECODERS, VOCABULARY
from tests.support.encoder_decoders import model as encoder_decoder
from tests.support.models import seeded
from tests.support.neighbours import all_but_slow
from tests.support.tokenizers import CORPUS, tokenizer

pytestmark = pytest.mark.usefixtures("shared_captures")

DATA = [torch.randint(0, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]


class Masked(LogitsProcessor):
    """Sets the logits of dropped ids to -inf."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.dropped = vocabulary.dropped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.dropped, -torch.inf)


def vocabulary_of(program: Program) -> Vocabulary:
    assert program.vocabulary is not None
    return program.vocabulary


def prompt_of(vocabulary: Vocabulary, tokens: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    return vocabulary.kept[torch.randint(len(vocabulary.kept), (1, tokens), generator=draw)]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "qwen2", "gpt2", "opt", "bloom"])
def test_greedy_tokens(name: str) -> None:
    model = seeded(DECODERS[name])
    decoder = lissom.compile_generation(model, max_length=40, passes="prune-vocabulary{keep=50}", data=DATA, goal=None)
    vocabulary = vocabulary_of(decoder.program)
    prompt, greedy = prompt_of(vocabulary), {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    mask, masked = torch.ones_like(prompt), LogitsProcessorList([Masked(vocabulary)])
    wanted = model.generate(prompt, attention_mask=mask, pad_token_id=0, logits_processor=masked, **greedy)
    actual = decoder.generate(prompt, attention_mask=mask, pad_token_id=0, **greedy)
    assert actual.tolist() == wanted.tolist()
    assert decoder.prefill(prompt).shape == (1, VOCABULARY)


def test_sampled_tokens_stay_in_the_vocabulary() -> None:
    decoder = lissom.compile_generation(
        seeded(DECODERS["llama"]), max_length=40, passes="prune-vocabulary{keep=9}", data=DATA, goal=None
    )
    vocabulary = vocabulary_of(decoder.program)
    torch.manual_seed(0)
    sampled = decoder.generate(prompt_of(vocabulary), max_new_tokens=30, do_sample=True, top_k=0, eos_token_id=None)
    assert {*sampled.flatten().tolist()} <= {*vocabulary.kept.tolist()}


def test_dropped_ids_in_a_prompt_are_refused_and_the_cache_stays() -> None:
    decoder = lissom.compile_generation(
        seeded(DECODERS["llama"]), max_length=40, passes="prune-vocabulary{keep=9}", data=DATA, goal=None
    )
    vocabulary = vocabulary_of(decoder.program)
    decoder.step(prompt_of(vocabulary))
    dropped = vocabulary.dropped.nonzero()[:1]
    with pytest.raises(InputError, match=f"the token id {int(dropped)}, which prune-vocabulary dropped, and the model has no"):
        decoder.step(dropped)
    assert decoder.length == 6


def test_a_saved_decoder_keeps_its_vocabulary(tmp_path: Path) -> None:
    decoder = lissom.compile_generation(
        seeded(DECODERS["gemma3"]), max_length=40, passes="prune-vocabulary{keep=50},quantize", data=DATA, goal=None
    )
    decoder.save(tmp_path / "decoder")
    loaded = lissom.load_generation(tmp_path / "decoder")
    vocabulary, kept = vocabulary_of(loaded.program), vocabulary_of(decoder.program).kept
    assert torch.equal(vocabulary.kept, kept)
    prompt = prompt_of(vocabulary)
    assert torch.equal(loaded.step(prompt), decoder.step(prompt))


@pytest.mark.parametrize("name", all_but_slow(["t5", "bart"], "bart"))
def test_encoder_decoders(name: str) -> None:
    model = encoder_decoder(f"encoder-decoder/{name}")
    size = int(model.config.vocab_size)
    data = [{"input_ids": ids % size, "labels": (ids * 7 + 1) % size} for ids in DATA]
    fast = lissom.compile_generation(model, max_length=24, passes="prune-vocabulary{keep=30}", data=data, goal=None)
    source, target = vocabulary_of(fast.encoder.compiled.program), vocabulary_of(fast.program)
    prompt, greedy = prompt_of(source, 9), {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    mask, masked = torch.ones_like(prompt), LogitsProcessorList([Masked(target)])
    wanted = model.generate(prompt, attention_mask=mask, logits_processor=masked, **greedy)
    assert fast.generate(prompt, attention_mask=mask, **greedy).tolist() == wanted.tolist()


def _llama_with_tokenizer(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer("byte-level"), **names)
    config = LlamaConfig(
        vocab_size=len(wrapped), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    seeded(lambda: LlamaForCausalLM(config)).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder).eval(), wrapped


@pytest.mark.parametrize("backend", all_but_slow(["eager", "onnxruntime"], "eager"))
def test_a_decoder_with_the_ids_of_a_new_tokenizer(backend: str, tmp_path: Path) -> None:
    model, old = _llama_with_tokenizer(tmp_path / "model")
    data = [old(text, return_tensors="pt").input_ids for text in CORPUS[:2]]
    passes = "prune-vocabulary{coverage=1,ids=tokenizer}"
    decoder = lissom.compile_generation(model, max_length=64, passes=passes, data=data, backend=backend, goal=None)
    vocabulary, new = vocabulary_of(decoder.program), lissom.pruned_tokenizer(decoder)
    assert decoder.config.vocab_size == len(new) == len(vocabulary.kept) < vocabulary.size
    assert decoder.generation_config.eos_token_id == new.eos_token_id
    prompt, original = (each("The quick brown dog", return_tensors="pt").input_ids for each in (new, old))
    assert torch.equal(vocabulary.kept[prompt], original)
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(
        original,
        attention_mask=torch.ones_like(original),
        logits_processor=LogitsProcessorList([Masked(vocabulary)]),
        **greedy,
    )
    answer = decoder.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    assert vocabulary.kept[answer].tolist() == wanted.tolist()
    decoder.save(tmp_path / "saved")
    loaded = lissom.load_generation(tmp_path / "saved")
    assert loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy).tolist() == answer.tolist()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("The quick brown dog").input_ids == prompt[0].tolist()


def test_prompts_are_read_by_the_new_tokenizer(tmp_path: Path) -> None:
    _llama_with_tokenizer(tmp_path / "model")
    request = Request("prune-vocabulary{keep=300,ids=tokenizer}", "eager", None, "off", None, keeps=False)
    decoder, new, ids = compile_prompted(
        str(tmp_path / "model"), "The quick brown fox", 4, request, lambda source: (), lambda sentence: None
    )
    assert len(new) == 300
    assert new.decode(ids[0], skip_special_tokens=True) == "The quick brown fox"
    assert decoder.step(ids).shape == (1, 300)


def test_encoder_and_decoder_with_other_ids_have_no_common_tokenizer(tmp_path: Path) -> None:
    _llama_with_tokenizer(tmp_path)
    config = T5Config(vocab_size=500, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0)
    model = seeded(lambda: T5ForConditionalGeneration(config))
    data = [{"input_ids": torch.full((1, 6), 280), "labels": torch.full((1, 6), 290)}]
    options = f'keep=270,ids=tokenizer,tokenizer="{tmp_path}"'
    with pytest.raises(UnsupportedError, match=r"encoder and decoder of .* have one tokenizer, and keep other token ids"):
        lissom.compile_generation(model, max_length=16, passes=f"prune-vocabulary{{{options}}}", data=data, goal=None)
