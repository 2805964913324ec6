"""Prefill and decode of models with recurrent layers: transformers, torch.compile, Lissom.

    python benchmarks/recurrent.py --update

Architectures of Mamba-2 130M, and of OLMo Hybrid (gated delta rule and attention) with some 200 million weights, random, one
sequence. Each engine runs in a process of its own. Prints a Markdown table; `--update` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from readme import processor_kind, put_table
from spread import quartiles, spread

PROMPT, TOKENS, LENGTH = 128, 32, 256
ENGINES = ("transformers fp32", "torch.compile fp32", "torch.compile bf16", "Lissom fp32", "Lissom bf16")
MODELS = ("Mamba-2 130M", "OLMo Hybrid 200M")


def build(name: str) -> Any:
    """A model with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == MODELS[0]:
        sizes = {"hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64, "state_size": 128, "n_groups": 1}
        config = transformers.Mamba2Config(vocab_size=50288, expand=2, tie_word_embeddings=True, **sizes)
        return transformers.Mamba2ForCausalLM(config).eval()
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    linear = {"linear_num_key_heads": 6, "linear_num_value_heads": 12, "linear_key_head_dim": 96, "linear_value_head_dim": 128}
    config = transformers.OlmoHybridConfig(vocab_size=50288, pad_token_id=0, layer_types=kinds, **sizes, **linear)
    return transformers.OlmoHybridForCausalLM(config).eval()


def steps_of(engine: str, model: Any) -> Callable[[Any], Callable[[Any], Any]]:
    """Starts a text: reads its prompt, and returns what reads one more token and gives logits."""
    import torch
    from transformers import StaticCache

    import lissom

    kind, _, precision = engine.rpartition(" ")
    if kind == "Lissom":
        passes = "cast{dtype=bf16}" if precision == "bf16" else "exact"
        decoder = lissom.compile_generation(model, passes=passes, max_length=LENGTH, goal=None)

        def start(prompt: Any) -> Callable[[Any], Any]:
            decoder.reset()
            decoder.step(prompt)
            return decoder.step

        return start
    model = model.to(torch.bfloat16) if precision == "bf16" else model
    forward = model.forward if kind == "transformers" else torch.compile(model.forward, dynamic=False)
    takes_positions = "position_ids" in type(model).forward.__code__.co_varnames

    def begin(prompt: Any) -> Callable[[Any], Any]:
        cache, read = StaticCache(config=model.config, max_cache_len=LENGTH), 0

        def step(ids: Any) -> Any:
            nonlocal read
            positions = {"position_ids": torch.arange(read, read + ids.shape[1])[None]} if takes_positions else {}
            read += ids.shape[1]
            return forward(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1, **positions).logits[:, -1]

        step(prompt)
        return step

    return begin


def measure(name: str, engine: str, rounds: int) -> str:
    """A row of the table: tokens a second of prompt and decode, medians with middle halves, and seconds to start."""
    import torch

    model = build(name)
    prompt = torch.randint(3, 50000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    prompts: list[float] = []
    decodes: list[float] = []
    with torch.inference_mode():
        start = steps_of(engine, model)
        start(prompt)(prompt[:, :1])
        first = time.perf_counter() - started
        for _ in range(rounds):
            began = time.perf_counter()
            step = start(prompt)
            middle = time.perf_counter()
            for index in range(TOKENS):
                step(prompt[:, index : index + 1])
            prompts.append(PROMPT / (middle - began))
            decodes.append(TOKENS / (time.perf_counter() - middle))
    prefill, decode = (spread(quartiles(values)) for values in (prompts, decodes))
    return f"| {name} | {engine} | {prefill} | {decode} | {first:.1f} |"


def main() -> None:
    """Measure each model on each engine and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(measure(*options.only, options.rounds))
        return
    lines = ["| model | engine | prompt, tokens/s | decode, tokens/s | first s |", "|---|---|---:|---:|---:|"]
    for name in MODELS:
        for engine in ENGINES:
            command = [sys.executable, __file__, "--rounds", str(options.rounds), "--only", name, engine]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
            error = (done.stderr.strip().splitlines() or ["it ended"])[-1]
            lines += rows or [f"| {name} | {engine} | failed: {error:.80} | | |"]
            print(lines[-1], file=sys.stderr)
    import torch

    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "lissom"))
    lines += [
        "",
        f"Medians of {options.rounds} rounds (middle half). {processor_kind()}, {torch.get_num_threads()} threads; "
        f"Python {platform.python_version()}, {packages}.",
    ]
    print("\n".join(lines))
    if options.update:
        put_table("recurrent", "\n".join(lines) + "\n", by_processor=True)


if __name__ == "__main__":
    main()
