"""Generates from a written folder by openvino-genai in a fresh process, and converts a tokenizer there.

The process runs this module: it reads a request from its standard input, and writes its answer to a file. It imports what
changes OpenVINO for the process that imports it, such as openvino_tokenizers.
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

from lissom.export.fresh_process import run_fresh
from lissom.io.processes import python_command

_DEVICE = "CPU"
_ANSWER = "answer.json"


@dataclass(frozen=True)
class Generation:
    """The likeliest tokens after each of some prompts, which are generated together; none ends a text.

    Attributes:
        prompts: token ids, each of which has one token or more.
        steps: tokens of an answer.
        options: of pipelines, each of which generates.
        text: is tokenized too; empty for a folder without a tokenizer.
    """

    directory: str
    prompts: Sequence[Sequence[int]]
    steps: int
    options: Sequence[dict[str, str]]
    text: str


@dataclass(frozen=True)
class Conversion:
    """The tokenizer of a folder as OpenVINO's IR in the same folder.

    Attributes:
        text: to tokenize.
    """

    directory: str
    text: str


def generate(name: str, request: Generation) -> tuple[list[list[list[int]]], list[int]]:
    """The answers to the prompts by each pipeline, and the ids of the text.

    Args:
        name: of the program, for errors.

    Raises:
        UnsupportedError: if openvino-genai does not load or run the folder.
    """
    found = _ask("openvino-genai", f"the decoder of {name}", "generate", asdict(request))
    return found["tokens"], found["ids"]


def convert_tokenizer(name: str, request: Conversion) -> list[int]:
    """Write `openvino_tokenizer.xml` and `openvino_detokenizer.xml`; returns the ids that transformers has for the text.

    Raises:
        UnsupportedError: if openvino_tokenizers has no conversion for the tokenizer.
    """
    return _ask("openvino_tokenizers", f"the tokenizer of {name}", "convert", asdict(request))["ids"]


def _ask(library: str, what: str, task: str, request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lissom-reload-") as exchange:
        content = json.dumps({"task": task, "exchange": exchange, "request": request})
        run_fresh(library, what, python_command("lissom.export.openvino.generated"), content)
        return json.loads((Path(exchange) / _ANSWER).read_text(encoding="utf-8"))


def _generate(request: Generation) -> dict[str, Any]:
    openvino: Any = importlib.import_module("openvino")
    library: Any = importlib.import_module("openvino_genai")
    config = library.GenerationConfig()
    config.do_sample, config.ignore_eos, config.max_new_tokens = False, True, request.steps
    longest = max(map(len, request.prompts))
    mask = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in request.prompts], np.int64)
    ids = np.array([[0] * (longest - len(prompt)) + [*prompt] for prompt in request.prompts], np.int64)
    answers: list[list[list[int]]] = []
    encoded: list[int] = []
    for options in request.options:
        pipeline = library.LLMPipeline(request.directory, _DEVICE, **options)
        if pipeline.get_generation_config().eos_token_id < 0:
            # It refuses to generate without one, even where it is to be ignored.
            config.set_eos_token_id(0)
        found = pipeline.generate(library.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask)), config)
        answers.append([[*map(int, tokens)] for tokens in found.tokens])
        if request.text:
            encoded = pipeline.get_tokenizer().encode(request.text).input_ids.data[0].tolist()
    return {"tokens": answers, "ids": encoded}


def _convert(request: Conversion) -> dict[str, Any]:
    openvino: Any = importlib.import_module("openvino")
    library: Any = importlib.import_module("openvino_tokenizers")
    transformers: Any = importlib.import_module("transformers")
    folder = Path(request.directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    models = library.convert_tokenizer(tokenizer, with_detokenizer=True)
    for name, model in zip(("openvino_tokenizer.xml", "openvino_detokenizer.xml"), models, strict=True):
        openvino.save_model(model, folder / name, compress_to_fp16=False)
    return {"ids": tokenizer(request.text)["input_ids"]}


def _answer(task: str, exchange: str, request: dict[str, Any]) -> None:
    answer = _generate(Generation(**request)) if task == "generate" else _convert(Conversion(**request))
    (Path(exchange) / _ANSWER).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    _answer(**json.loads(sys.stdin.read()))
