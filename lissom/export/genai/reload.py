"""Generates from a written folder by ONNX Runtime GenAI in a fresh process.

The process runs this module: it reads a request from its standard input, generates the likeliest tokens after the parts of
a text in turn, none of which ends it, and writes the text with the answers, and the logits they were chosen from, to a file.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from lissom.export.fresh_process import run_fresh
from lissom.io.processes import python_command

_ANSWER = "answer.safetensors"


@dataclass(frozen=True)
class Request:
    """What the fresh process generates.

    Attributes:
        directory: the folder.
        exchange: the directory of the answer.
        prompts: the parts of the text, each of which is answered.
        steps: tokens of an answer.
        length: the capacity of the KV cache.
        shared: whether past and present are one buffer.
    """

    directory: str
    exchange: str
    prompts: Sequence[Sequence[int]]
    steps: int
    length: int
    shared: bool


@dataclass(frozen=True)
class Generated:
    """A text with answers.

    Attributes:
        tokens: of the whole text, [tokens].
        chosen: the positions of the answers' tokens in it, [answers' tokens].
        logits: that each of these was chosen from, [answers' tokens, vocabulary].
    """

    tokens: torch.Tensor
    chosen: torch.Tensor
    logits: torch.Tensor


def generate(
    name: str, directory: Path, prompts: Sequence[Sequence[int]], steps: int, length: int, *, shared: bool
) -> Generated:
    """The text that a fresh process generates.

    Args:
        name: of the program, for errors.

    Raises:
        UnsupportedError: if the library does not load or run the folder.
    """
    with tempfile.TemporaryDirectory(prefix="lissom-reload-") as exchange:
        request = Request(str(directory), exchange, prompts, steps, length, shared)
        command = python_command("lissom.export.genai.reload")
        run_fresh("ONNX Runtime GenAI", f"the decoder of {name}", command, json.dumps(asdict(request)))
        answer = load_file(Path(exchange) / _ANSWER)
    return Generated(*(torch.from_numpy(answer[part]) for part in ("tokens", "chosen", "logits")))


def _answer(request: Request) -> None:
    """Load the folder, generate, and write the text."""
    library: Any = importlib.import_module("onnxruntime_genai")
    if hasattr(library, "disable_telemetry_events"):
        library.disable_telemetry_events()
    model = library.Model(request.directory)
    params = library.GeneratorParams(model)
    options = {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1}
    # No text ends before its steps, so that all of them are compared.
    lengths = {"max_length": request.length, "min_length": request.length}
    params.set_search_options(past_present_share_buffer=request.shared, **lengths, **options)
    generator = library.Generator(model, params)
    chosen: list[int] = []
    logits: list[np.ndarray] = []
    for number, prompt in enumerate(request.prompts):
        if number:
            # Reads the last token of the answer into the KV cache, which append_tokens takes to be there.
            generator.get_logits()
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(request.steps):
            chosen.append(generator.token_count())
            logits.append(np.array(generator.get_logits(), np.float32).reshape(-1))
            generator.generate_next_token()
    tokens = np.array(generator.get_sequence(0), np.int64)
    answer = {"tokens": tokens, "chosen": np.array(chosen, np.int64), "logits": np.stack(logits)}
    save_file(answer, Path(request.exchange) / _ANSWER)


if __name__ == "__main__":
    _answer(Request(**json.loads(sys.stdin.read())))
