"""The demo: all-MiniLM-L6-v2 compiled, checked on real sentences, and timed against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import nn

from lissom.api import compile
from lissom.compiler.verify.divergence import relative_error
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.inspect.progress import Report, progress_bar
from lissom.inspect.report import Report as CompileReport
from lissom.measure.timing import Timing, time_calls
from lissom.runtime.compiled_model import CompiledModel

SENTENCES = (
    "How do I reset my password?",
    "I forgot my login and cannot get into my account.",
    "The recipe needs two eggs and a pinch of salt.",
    "Whisk the eggs, then season them.",
    "The orbit of the comet takes it past Jupiter.",
    "A comet was seen near the giant planet last night, and astronomers all over the world turned their telescopes to it.",
)
SHAPES = ((1, 32), (1, 128), (8, 128))
"""The batch sizes and token counts at which latency is measured."""


@dataclass(frozen=True)
class Demonstration:
    """The results of the demo.

    Attributes:
        worst_error: relative, of the embeddings of SENTENCES.
        similarity: of each pair of sentences, from the compiled model.
        timings: per shape and engine.
        absent: engines that could not run, each with the reason.
    """

    compiled: CompiledModel
    worst_error: float
    similarity: torch.Tensor
    timings: Mapping[tuple[int, int], Mapping[str, Timing]]
    absent: Mapping[str, str]

    @property
    def report(self) -> CompileReport:
        """The compile report, with the speedup over PyTorch at each shape."""
        faster = tuple(row["PyTorch eager"].median_ms / row["Lissom"].median_ms for row in self.timings.values())
        return replace(self.compiled.report, times_faster=faster)


def demonstrate(seconds: float = 2.0) -> Demonstration:
    """Compile MiniLM, compare its embeddings with the original's, and time both and torch.compile.

    Args:
        seconds: timing per engine and shape.
    """
    checkpoint = load("minilm")
    compiled = compile(checkpoint.model, checkpoint.example_inputs)
    inputs = checkpoint.encode(SENTENCES)
    with torch.inference_mode():
        wanted = embed(checkpoint.model, inputs)
    embeddings = embed(compiled, inputs)
    with progress_bar("demo") as progress:
        timings, absent = _time_engines(checkpoint, compiled, seconds, progress)
    return Demonstration(compiled, relative_error(wanted, embeddings), embeddings @ embeddings.T, timings, absent)


def embed(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings, [sentences, 384]: the mean over real tokens of the last hidden state, normalised to length 1."""
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _time_engines(
    checkpoint: Checkpoint, compiled: CompiledModel, seconds: float, progress: Report
) -> tuple[dict[tuple[int, int], dict[str, Timing]], dict[str, str]]:
    engines = {"PyTorch eager": checkpoint.model, "torch.compile": torch.compile(checkpoint.model), "Lissom": compiled}
    absent: dict[str, str] = {}
    timings = {}
    for index, (batch, tokens) in enumerate(SHAPES):
        progress(f"timing {batch} x {tokens}", index, len(SHAPES))
        inputs = checkpoint.encode([" ".join(SENTENCES)] * batch, tokens)
        calls = {name: _inference(engine, inputs) for name, engine in engines.items() if name not in absent}
        try:
            calls["torch.compile"]()
        except Exception as error:
            absent["torch.compile"] = str(error).splitlines()[0]
            del calls["torch.compile"]
        timings[batch, tokens] = time_calls(calls, seconds)
    return timings, absent


def _inference(engine, inputs: Mapping[str, torch.Tensor]):  # noqa: ANN001, ANN202
    def call() -> object:
        with torch.inference_mode():
            return engine(**inputs)

    return call


def latency_table(demonstration: Demonstration) -> Table:
    """Median milliseconds per call, with the interquartile range in parentheses."""
    table = Table(
        title=f"latency, ms: median (middle half), {torch.get_num_threads()} threads, torch {torch.__version__}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("engine")
    for batch, tokens in demonstration.timings:
        table.add_column(f"{batch} x {tokens}", justify="right")
    for name in ("PyTorch eager", "torch.compile", "Lissom"):
        if name in demonstration.absent:
            table.add_row(name, f"did not run: {demonstration.absent[name]}")
            continue
        table.add_row(name, *(str(row[name]) for row in demonstration.timings.values()))
    return table


def similarity_table(demonstration: Demonstration) -> Table:
    """For each sentence, the other one its embedding is nearest to."""
    table = Table(title="nearest sentence, by cosine of the compiled model's embeddings", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("sentence", "nearest", "cosine"):
        table.add_column(heading)
    others = demonstration.similarity - 2 * torch.eye(len(SENTENCES))
    for sentence, row in zip(SENTENCES, others, strict=True):
        best = int(row.argmax())
        table.add_row(sentence, SENTENCES[best], f"{float(row[best]):.2f}")
    return table
