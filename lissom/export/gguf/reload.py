"""Asks llama.cpp in a fresh process for the log probabilities of a text with a written file.

The process runs this module: it reads a request from its standard input, and writes its answer to a file.
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

from lissom.export.fresh_process import run_fresh
from lissom.io.processes import python_command

PACKAGE = "xllamacpp"
"""llama.cpp for Python."""
_ANSWER = "answer.json"


_BIAS = 1e6
"""More than the distance of any two logits."""


@dataclass(frozen=True)
class Request:
    """A text for llama.cpp.

    Attributes:
        file: in the format GGUF.
        text: token ids.
        read: how many of them are read before llama.cpp is asked for the first.
    """

    file: str
    text: Sequence[int]
    read: int


def log_probabilities(name: str, request: Request) -> list[float]:
    """What llama.cpp gives each token of the text that is not read yet.

    Args:
        name: of the program, for errors.

    Raises:
        UnsupportedError: if llama.cpp does not load or run the file.
    """
    with tempfile.TemporaryDirectory(prefix="lissom-reload-") as exchange:
        content = json.dumps({"exchange": exchange, "request": asdict(request)})
        run_fresh("llama.cpp", f"the file of {name}", python_command("lissom.export.gguf.reload"), content)
        return json.loads((Path(exchange) / _ANSWER).read_text(encoding="utf-8"))


def _answer(exchange: str, request: dict[str, Any]) -> None:
    """Load the file, ask for one token after the other, and write what they got."""
    asked, llama = Request(**request), importlib.import_module(PACKAGE)
    options: Any = llama.CommonParams()
    options.model.path, options.n_ctx = asked.file, len(asked.text)
    options.n_parallel, options.warmup, options.n_gpu_layers = 1, False, 0
    # In float32, and in the order of the definition, so that only the file's own types round.
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(options)
    found: list[float] = []
    for end in range(asked.read, len(asked.text)):
        wanted: dict[str, Any] = {"prompt": list(asked.text[:end]), "n_predict": 1, "temperature": 0, "n_probs": 1}
        # The bias makes llama.cpp choose this token; what it tells is from before the bias.
        wanted["logit_bias"] = [[asked.text[end], _BIAS]]
        (chosen,) = server.handle_completions(wanted)["choices"][0]["logprobs"]["content"]
        found.append(chosen["logprob"])
    (Path(exchange) / _ANSWER).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _answer(**json.loads(sys.stdin.read()))
