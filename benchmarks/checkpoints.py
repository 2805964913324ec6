"""Gemma 3 270M in int4 from folders of other runtimes, prefill and decode in tokens per second: who runs which how fast.

    python benchmarks/checkpoints.py --update
    python benchmarks/checkpoints.py --engines transformers lissom

`lissom export` writes one model of four-bit weights, with its embedding table in float, as a checkpoint of compressed-tensors,
a folder of ONNX Runtime GenAI, and IR of OpenVINO; onnxruntime-genai's model builder makes a folder of its own, whose table has
four bits as well. A prompt of 128 tokens, then 64 tokens chosen greedily, each engine in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from apart import run_apart
from decoder import ANSWER, LENGTH, PROMPT, ROUNDS, Engine, Genai, Static, answer, built, perplexity, texts
from quality import conditions
from readme import put_table
from spread import Quartiles, quartiles, spread

import lissom
from lissom.cli.bench.worker import peak_bytes
from lissom.frontends.models.huggingface import load

_PASSES = "quantize{scheme=int4-weight,symmetric=true,embeddings=false}"
FORMATS = ("compressed-tensors", "genai", "openvino")


@dataclass(frozen=True)
class Result:
    """prefill, decode: tokens per second with quartiles. peak: of the process, in bytes. perplexity: None if not measured."""

    prefill: Quartiles
    decode: Quartiles
    peak: int
    perplexity: float | None


class Transformers(Static):
    """The checkpoint in transformers, which compressed-tensors adds its layers to, with a `StaticCache`."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        checkpoint: Any = argparse.Namespace(model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval())
        super().__init__(checkpoint)


class Lissom:
    """`lissom.compile_generation` of the checkpoint; bytes_read is not computed."""

    bytes_read = 0

    def __init__(self, folder: Path, passes: str) -> None:
        self.decoder = lissom.compile_generation(str(folder), max_length=LENGTH, passes=passes, goal=None)
        self.reset = self.decoder.reset

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.step(ids)[0]


_STORED = "use-stored-weights,cast{dtype=bf16}"

ENGINES: dict[str, tuple[str, Callable[[Path], Engine]]] = {
    "transformers": ("transformers, bf16", lambda folder: Transformers(folder / "compressed-tensors")),
    "lissom": ("Lissom, table in bf16", lambda folder: Lissom(folder / "compressed-tensors", _STORED)),
    "lissom-table": (
        "Lissom, table in int8",
        lambda folder: Lissom(folder / "compressed-tensors", f"{_STORED},quantize{{scheme=int8-weight,embeddings=true}}"),
    ),
    "genai": ("ONNX Runtime GenAI, written by Lissom", lambda folder: Genai(folder / "genai")),
    "genai-builder": ("ONNX Runtime GenAI, by its own builder", lambda _: built("int4", load("gemma3-270m"))),
}
OPENVINO = "openvino"
TITLES = {name: title for name, (title, _) in ENGINES.items()} | {OPENVINO: "OpenVINO GenAI, written by Lissom"}


def measure(name: str, folder: Path, threads: int, ids: torch.Tensor) -> Result:
    """Measure one engine; this process does nothing else. folder: of the formats. ids: the prompt and the text after it."""
    torch.set_num_threads(threads)
    prompt = ids[:, :PROMPT]
    if name == OPENVINO:
        return _measure_openvino(folder / OPENVINO, threads, prompt)
    with torch.inference_mode():
        engine = ENGINES[name][1](folder)
        answer(engine, prompt)  # compiles and warms up
        rounds = [answer(engine, prompt) for _ in range(ROUNDS)]
        peak = peak_bytes()
        loss = perplexity(engine, ids) if ids.shape[1] > PROMPT else None
    prefill, decode = zip(*rounds, strict=True)
    return Result(quartiles([PROMPT / time for time in prefill]), quartiles([ANSWER / time for time in decode]), peak, loss)


def _measure_openvino(folder: Path, threads: int, prompt: torch.Tensor) -> Result:
    """openvino-genai with its own timings; it gives no logits, so there is no perplexity."""
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)
    settings = openvino_genai.GenerationConfig(max_new_tokens=ANSWER + 1, ignore_eos=True, do_sample=False)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt.numpy()), openvino.Tensor(torch.ones_like(prompt).numpy()))
    metrics = [pipeline.generate(inputs, settings).perf_metrics for _ in range(ROUNDS + 1)][1:]
    return Result(
        quartiles([1e3 * PROMPT / one.get_ttft().mean for one in metrics]),
        quartiles([1e3 / one.get_tpot().mean for one in metrics]),
        peak_bytes(),
        None,
    )


def write(folder: Path) -> None:
    """The model in every format."""
    for form in FORMATS:
        command = [sys.executable, "-m", "lissom", "export", "gemma3-270m", str(folder / form)]
        subprocess.run([*command, "--format", form, "--passes", _PASSES, "--checks", "structural"], check=True)


def table(engines: list[str], threads: int, tokens: int) -> str:
    """The results as Markdown, with the machine."""
    torch.set_num_threads(threads)
    ids = texts(load("gemma3-270m"), tokens)
    lines = ["| engine | prompt, tokens/s | decode, tokens/s | peak MB | perplexity |", "|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for name in engines:
            arguments = ["--one", name, "--folder", folder, "--threads", str(threads)]
            measured = run_apart(__file__, arguments, ids.tolist(), {"OMP_NUM_THREADS": str(threads)})
            result = Result(**measured)  # pyright: ignore[reportCallIssue]
            loss = "" if result.perplexity is None else f"{result.perplexity:.2f}"
            speeds = f"{spread(result.prefill, 0)} | {spread(result.decode)}"
            lines.append(f"| {TITLES[name]} | {speeds} | {result.peak / 1e6:.0f} | {loss} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join([*lines, "", f"Medians of {ROUNDS} rounds (middle half). {conditions()}", ""])


def main() -> None:
    """Measure the engines asked for, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engines", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=512, help="tokens for the perplexity; 0 for none")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        ids = torch.tensor(json.load(sys.stdin))
        print(json.dumps(asdict(measure(options.one, options.folder, options.threads, ids))))
        return
    printed = table(options.engines, options.threads, options.tokens)
    print(printed)
    if options.update:
        put_table("checkpoints", printed, by_processor=True)


if __name__ == "__main__":
    main()
