"""Tests of encoder-decoders in lissom.generation: `generate`, beams, loops, directories, pipelines, errors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSeq2SeqLM, pipeline

import lissom
from lissom.errors import CaptureError, InputError, LissomError, UnsupportedError
from lissom.frontends.generation.encoder_decoder import encoder_example
from lissom.generation.directory import ENCODER
from lissom.generation.encoder_decoder import EncoderDecoderModel
from tests.support.decoders import decoder
from tests.support.encoder_decoders import MAX_LENGTH, compiled, model, source
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Logits are up to ten, and sums of float32 in another order.
CLOSE = {"rtol": 1e-4, "atol": 5e-4}
BART = "encoder-decoder/bart"
FAMILIES = [
    BART,
    *(f"encoder-decoder/{name}" for name in ("t5", "t5gemma", "t5gemma2", "marian", "mbart", "pegasus", "m2m_100")),
    "encoder-decoder/encoder-decoder",
    *(f"speech/{name}" for name in ("whisper", "speech_to_text", "moonshine", "speecht5", "canary")),
]


@pytest.mark.parametrize("name", all_but_slow(FAMILIES, BART))
def test_generate_gives_the_tokens_the_model_gives(name: str) -> None:
    fast = compiled(name)
    begun = torch.tensor([[1, 7, 8], [1, 9, 6]])
    for tokens in (12, 7):
        inputs = source(name, 2, tokens)
        wanted = model(name).generate(**inputs, **GREEDY, use_cache=True)
        assert torch.equal(fast.generate(**inputs, **GREEDY), wanted)
        options = {**GREEDY, "decoder_input_ids": begun}
        if name != "speech/whisper":  # whose own generate takes no tokens to begin with
            assert torch.equal(fast.generate(**inputs, **options), model(name).generate(**inputs, **options, use_cache=True))
    inputs = source(name, 1, 9)
    wanted = model(name).generate(**inputs, **GREEDY, num_beams=2, use_cache=True)
    assert torch.equal(fast.generate(**inputs, **GREEDY, num_beams=2), wanted)


def test_a_loop_of_ones_own() -> None:
    bart, fast = model(BART), compiled(BART)
    inputs, tokens = source(BART, 2, 9), torch.tensor([[0, 8, 5, 9], [0, 6, 7, 4]])
    with torch.no_grad():
        wanted = bart(**inputs, decoder_input_ids=tokens, use_cache=False).logits
    fast.encode(**{name: tensor.int() for name, tensor in inputs.items()})
    assert torch.allclose(fast.step(tokens[:, :3]), wanted[:, 2], **CLOSE)
    assert torch.allclose(fast.step(tokens[:, 3:]), wanted[:, 3], **CLOSE)
    # Rows go on from each other's texts and tokens.
    fast.reorder(torch.tensor([1, 0]))
    fast.crop(3)
    assert torch.allclose(fast.step(tokens[:, 3:].flip(0)), wanted[:, 3].flip(0), **CLOSE)
    # One text for both rows.
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    fast.encode(**one)
    assert torch.allclose(fast.step(tokens[:1, :1].repeat(2, 1)), wanted[:1, 0].repeat(2, 1), **CLOSE)
    # Without an attention mask nothing is padding, and the forward of transformers takes the encoder's inputs too.
    found = fast(tokens, input_ids=one["input_ids"])
    assert torch.allclose(found.logits[0, -1], wanted[0, 3], **CLOSE)


def test_call_with_cache_goes_on_where_it_was() -> None:
    """The encoder's inputs may be given again: the text of the decoder stays."""
    bart, fast = model(BART), compiled(BART)
    inputs, tokens = source(BART, 2, 9), torch.tensor([[0, 8, 5], [0, 6, 7]])
    with torch.no_grad():
        wanted = bart(**inputs, decoder_input_ids=tokens, use_cache=False).logits[:, -1]
    begun = fast(tokens[:, :2], **inputs)
    found = fast(tokens[:, 2:], cache=begun.cache, **inputs)
    assert torch.allclose(found.logits[:, -1], wanted, **CLOSE)


def test_both_programs_share_the_weights_of_the_model() -> None:
    bart, fast = model(BART), compiled(BART)
    places = {weight.data_ptr() for weight in bart.parameters()}
    programs = fast.program, fast.encoder.compiled.program
    shared = [{weight.data_ptr() for weight in program.weights().values()} & places for program in programs]
    assert all(shared)
    # The encoder computes the keys and values of cross-attention, and the decoder does not.
    assert not any("encoder_attn.k_proj" in name for name in programs[0].weights())
    assert any("encoder_attn" in name for name in programs[1].weights())


def test_it_is_saved_loaded_and_copied(tmp_path) -> None:
    fast, inputs = compiled(BART), source(BART, 2, 8)
    wanted = fast.generate(**inputs, **GREEDY)
    fast.save(tmp_path / "saved")
    assert (tmp_path / "saved" / ENCODER).is_file()
    again = lissom.load_generation(tmp_path / "saved")
    assert torch.equal(again.generate(**inputs, **GREEDY), wanted)
    auto: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert isinstance(auto, EncoderDecoderModel) and type(auto).__name__ == "BartForConditionalGeneration"
    assert torch.equal(copy.deepcopy(auto).generate(**inputs, **GREEDY), wanted)
    assert auto.num_parameters() == fast.num_parameters() > fast.encoder.compiled.num_parameters()


@pytest.mark.slow
def test_passes_apply_to_both_programs() -> None:
    data = [source(BART, 2, 9) | {"labels": torch.tensor([[7, 8, 9], [5, 6, -100]])}]
    passes = "quantize{scheme=int8-dynamic},quantize-cache"
    small = lissom.compile_generation(model(BART), max_length=MAX_LENGTH, batch=2, passes=passes, data=data, goal=None)
    for report in (small.report, small.encoder.report):
        assert "quantize" in [step.spelling for step in report.history.steps]
    notes = [note for step in small.report.history.steps for note in step.notes]
    assert any("the cache takes" in note for note in notes)
    assert small.generate(**source(BART, 2, 7), **GREEDY).shape == (2, 13)


@pytest.mark.slow
def test_a_metric_scores_both_programs() -> None:
    inputs, tokens = source(BART, 2, 9), torch.tensor([[0, 8, 5], [0, 6, 7]])

    def likelihood(logits_of: Any) -> float:
        found = logits_of(tokens, **inputs, all_positions=True).log_softmax(-1)
        assert found.shape[:2] == (2, 3)
        return float(found[:, 1:].gather(-1, tokens[:, 1:, None]).mean())

    options = {"passes": "quantize{scheme=int8-dynamic}", "metric": likelihood, "all_logits": True, "goal": None}
    small = lissom.compile_generation(model(BART), max_length=MAX_LENGTH, batch=2, max_drop=1.0, **options)
    scores = [[step.metric for step in report.history.steps] for report in (small.encoder.report, small.report)]
    with torch.no_grad():
        logits = model(BART)(**inputs, decoder_input_ids=tokens, use_cache=False).logits
    wanted = float(logits.log_softmax(-1)[:, 1:].gather(-1, tokens[:, 1:, None]).mean())
    assert scores[0][0] == pytest.approx(wanted, abs=1e-3)
    # The decoder is scored with the encoder as it was compiled.
    assert scores[1][0] == pytest.approx(scores[0][-1], abs=1e-3) and scores[0][-1] != scores[0][0]
    with pytest.raises(LissomError, match="all_logits=True"):
        lissom.compile_generation(model(BART), max_length=MAX_LENGTH, batch=2, metric=likelihood)


@pytest.mark.slow
def test_onnxruntime_gives_the_same_tokens(tmp_path) -> None:
    pytest.importorskip("onnxruntime")
    backend = lissom.OnnxRuntime(timing_seconds=0)
    fast = lissom.compile_generation(model(BART), max_length=MAX_LENGTH, batch=2, backend=backend)
    inputs = source(BART, 2, 9)
    wanted = model(BART).generate(**inputs, **GREEDY, use_cache=True)
    assert torch.equal(fast.generate(**inputs, **GREEDY), wanted)
    fast.save(tmp_path / "saved")
    assert torch.equal(lissom.load_generation(tmp_path / "saved").generate(**inputs, **GREEDY), wanted)


def refusals() -> dict[str, tuple[type[LissomError], str, Any]]:
    fast = compiled(BART)
    fast._source = []  # as before the first text
    inputs = source(BART, 2, 9)

    def make(**options: Any) -> Any:
        return lissom.compile_generation(model(BART), max_length=MAX_LENGTH, **options)

    return {
        "step first": (InputError, "call encode(...) before step", lambda: fast.step(torch.zeros(2, 1).long())),
        "no source": (InputError, "input_ids is a NoneType; give a tensor", lambda: fast.encode()),
        "three rows": (InputError, "read 3 rows", lambda: fast.encode(input_ids=torch.ones(3, 4).long())),
        "attentions": (UnsupportedError, "leave out output_attentions=", lambda: fast.encode(**inputs, output_attentions=True)),
        "other argument": (InputError, "'pixels'", lambda: fast.encode(**inputs, pixels=torch.ones(2))),
        "other outputs": (
            InputError,
            "without the keys and values of cross-attention",
            lambda: fast.generate(encoder_outputs=model(BART).get_encoder()(**inputs), **GREEDY),
        ),
        "three beams": (InputError, "compile it with batch=6", lambda: fast.generate(**inputs, **GREEDY, num_beams=3)),
        "too long": (InputError, "the cache holds 24", lambda: fast.generate(**inputs, max_new_tokens=25)),
        "trained": (UnsupportedError, "finetune trains one", lambda: make(passes="finetune{minutes=1}")),
        "ranks": (UnsupportedError, "runs in one process", lambda: make(backend="distributed", world_size=2)),
        "inputs of text": (InputError, "is a str at 'input_ids'", lambda: make(encoder_inputs={"input_ids": "a"})),
        "inputs without a mask": (
            InputError,
            "encoder_inputs= has no attention_mask",
            lambda: make(encoder_inputs={"input_ids": torch.ones(2, 9).long()}),
        ),
        "data without tokens": (InputError, "needs labels or decoder_input_ids", lambda: make(data=[inputs], checks="off")),
        "compiled": (CaptureError, "is compiled already", lambda: lissom.compile_generation(fast, max_length=16)),
    }


def test_what_does_not_fit_is_refused() -> None:
    for name, (kind, text, call) in refusals().items():
        with pytest.raises(LissomError) as caught:
            call()
        assert type(caught.value) is kind and text in str(caught.value), f"{name}: {caught.value!r}"


def test_models_that_are_not_supported_are_refused() -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM has no encoder"):
        lissom.compile_generation(decoder("llama"), max_length=16, encoder_inputs={})
    with pytest.raises(UnsupportedError, match="has a generate of its own"):
        lissom.compile_generation(model("encoder-decoder/seamless_m4t"), max_length=16)


def test_models_such_as_whisper_read_no_mask() -> None:
    assert list(encoder_example(model("speech/whisper"), None)) == ["input_features"]
    assert list(encoder_example(model(BART), None)) == ["input_ids", "attention_mask"]


@pytest.mark.slow
def test_a_pipeline_of_speech_recognition_takes_it() -> None:
    made = Tokenizer(models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    parts = {
        "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=made),
        "feature_extractor": transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True),
    }
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    texts = [
        pipeline("automatic-speech-recognition", model=found, **parts)(sound, generate_kwargs=GREEDY | {"num_beams": 1})["text"]
        for found in (compiled("speech/moonshine", batch=1), model("speech/moonshine"))
    ]
    assert texts[0] == texts[1] and len(texts[0].split()) > 5
