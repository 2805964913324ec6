"""Tests of Whisper in pipelines: timestamps of segments, for short and long recordings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import AddedToken
from transformers import pipeline

import lissom
from lissom.errors import UnsupportedError
from tests.support.models import seeded

SPECIAL = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>"),
    *("<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
)
STAMPS = 1501  # one every 0.02 s of 30 s
GREEDY = {"max_new_tokens": 12, "num_beams": 1, "do_sample": False, "language": "en", "task": "transcribe"}


def tokenizer() -> Any:
    """One token for each byte, and Whisper's own."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocabulary = {letters[byte]: byte for byte in range(256)} | {name: 256 + index for index, name in enumerate(SPECIAL)}
    made = transformers.WhisperTokenizer(vocab=vocabulary, merges=[], language="en", task="transcribe")
    made.add_tokens([AddedToken(name, special=True) for name in SPECIAL if name not in made.get_vocab()])
    made.add_tokens([AddedToken(f"<|{index * 0.02:.2f}|>") for index in range(STAMPS)])
    return made


def whisper(tokens: Any) -> Any:
    """A Whisper that hears one second, with random weights large enough for its tokens to differ."""
    ids = {name: tokens.convert_tokens_to_ids(name) for name in SPECIAL}
    sides = ("encoder", "decoder")
    sizes: dict[str, Any] = {f"{side}_{name}": size for side in sides for name, size in (("layers", 1), ("attention_heads", 4))}
    sizes |= {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 50, "num_mel_bins": 80}
    ends = {f"{name}_token_id": ids["<|endoftext|>"] for name in ("pad", "bos", "eos")}
    starts = {"decoder_start_token_id": ids["<|startoftranscript|>"], "suppress_tokens": [], "begin_suppress_tokens": []}
    config = transformers.WhisperConfig(vocab_size=len(tokens), max_target_positions=64, **sizes, **ends, **starts)
    model: Any = seeded(lambda: transformers.WhisperForConditionalGeneration(config)).eval()
    for weight in model.parameters():
        weight.requires_grad_(False)
        if weight.dim() > 1:
            weight.mul_(4)
    own = model.generation_config
    own.no_timestamps_token_id, own.prev_sot_token_id = ids["<|notimestamps|>"], ids["<|startofprev|>"]
    own.lang_to_id, own.is_multilingual, own.max_initial_timestamp_index = {"<|en|>": ids["<|en|>"]}, True, 20
    own.task_to_id = {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")}
    own.alignment_heads = [[0, 0]]
    return model


@pytest.mark.slow
def test_timestamps_of_segments_are_those_of_the_model() -> None:
    tokens = tokenizer()
    model = whisper(tokens)
    fast = lissom.compile_generation(model, max_length=64, goal=None, checks="off")
    parts = {"tokenizer": tokens, "feature_extractor": transformers.WhisperFeatureExtractor(chunk_length=1)}
    pipes = [pipeline("automatic-speech-recognition", model=found, **parts) for found in (model, fast)]
    cut = {"chunk_length_s": 1, "stride_length_s": 0.1}
    for seconds, options in ((0.8, {}), (2.7, {}), (2.7, cut)):
        sound = np.random.default_rng(0).standard_normal(int(16000 * seconds)).astype(np.float32)
        wanted, found = (pipe(sound.copy(), return_timestamps=True, generate_kwargs=GREEDY, **options) for pipe in pipes)
        assert found == wanted and found["chunks"]
    with pytest.raises(UnsupportedError, match="leave out output_attentions="):
        pipes[1](sound, return_timestamps="word", generate_kwargs=GREEDY)
