"""Perplexity of Gemma 3 270M in llama.cpp beside Lissom's: the same passes, the same tokens, written as a GGUF file.

    python benchmarks/llama_quality.py
    python benchmarks/llama_quality.py --passes "quantize{scheme=int4-weight}" --types q4_k_m --tokens 2048

The text is that of quality.py, in windows that begin with the BOS token. llama.cpp is asked for one token after the other, with
the prompt kept in its cache: a bias on the logits makes it choose the token of the text, and the log probability that it
reports is the one before the bias. The change is that of the mean loss, with its standard error.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llama import server_options
from quality import WINDOW, conditions, decoder_batches, losses, perplexity_change, windows

import lissom
from lissom.frontends.models.huggingface import load

_BIAS = 1e6
"""More than the distance of any two logits."""


def server_of(file: Path, threads: int) -> Any:
    """llama.cpp with the file, one text at a time."""
    import xllamacpp

    options = server_options(WINDOW, 1, threads)
    options.model.path = str(file)
    options.warmup, options.cache_prompt = False, True
    return xllamacpp.Server(options)


def losses_in_llama(server: Any, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The negative log-likelihood of every token but the first of each window, in float64."""
    found: list[float] = []
    for ids in texts:
        tokens = ids[0].tolist()
        for end in range(1, len(tokens)):
            request = {"prompt": tokens[:end], "n_predict": 1, "n_probs": 1, "temperature": 0, "cache_prompt": True}
            request["logit_bias"] = [[tokens[end], _BIAS]]
            (choice,) = server.handle_completions(request)["choices"][0]["logprobs"]["content"]
            assert choice["id"] == tokens[end]
            found.append(-choice["logprob"])
    return torch.tensor(found, dtype=torch.float64)


def table(passes: str, types: str | None, tokens: int, threads: int) -> str:
    """Perplexity of the model, of the program after the passes, and of its file."""
    checkpoint = load("gemma3-270m")
    texts = windows(checkpoint, "evaluation", tokens)
    base = losses(checkpoint.model, checkpoint, texts)
    optimized = lissom.optimize(
        checkpoint.model, checkpoint.example_inputs, passes=passes, data=decoder_batches(checkpoint, 2048), checks="off"
    )
    with tempfile.TemporaryDirectory() as folder:
        written = optimized.export_gguf(Path(folder) / "model.gguf", types=types)  # pyright: ignore[reportArgumentType]
        in_llama = losses_in_llama(server_of(Path(folder) / "model.gguf", threads), texts)
    rows = {
        "PyTorch, the model": base,
        f"Lissom, `{passes}`": losses(optimized.program, checkpoint, texts),
        f"llama.cpp, the file: {written.megabytes:.0f} MB": in_llama,
    }
    lines = ["| engine | perplexity | change |", "|---|---:|---:|"]
    lines += [f"| {name} | {' | '.join(perplexity_change(base, reached))} |" for name, reached in rows.items()]
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passes", default="exact", help="as for lissom optimize")
    parser.add_argument("--types", help="K types for matrices in floating point, such as q4_k_m")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(conditions())
    print(table(given.passes, given.types, given.tokens, given.threads))


if __name__ == "__main__":
    main()
