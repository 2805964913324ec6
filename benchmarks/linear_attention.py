"""Speed and quality of linear attention against the length: softmax and the feature maps of `linear-attention`.

    python benchmarks/linear_attention.py --update

Speed: self-attention of MiniLM's width, bidirectional and causal, and an encoder like MiniLM, with random weights, from 128
to 16,384 tokens, with PyTorch, with Lissom's kernels, and with each feature map, on each backend. Each engine runs in a process
of its own, shortest text first, so that its peak memory is that of the current text, beyond its memory after the build.
ONNX Runtime stores all scores of a softmax, and is skipped beyond --most-scores.

Quality: all-MiniLM-L6-v2 without training, with the maps fitted to softmax on other texts, and the last one, two or three, or
all layers linear: as in quality.py, and on texts of 256 tokens.

Prints Markdown tables; `--update` puts them into benchmarks/README.md and draws benchmarks/linear_attention.svg.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from figures import save, subplots
from memory import reset_peak
from quality import calibration_batches, conditions, cosine, difference, embed, long_texts, read_pairs, retrieve
from readme import put_table
from torch import nn
from torch.nn import functional

import lissom
from lissom.cli.bench.worker import peak_bytes
from lissom.frontends.models.huggingface import load
from lissom.measure.timing import time_calls

FIGURE = Path(__file__).parent / "linear_attention.svg"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FEATURES = ("elu", "relu", "hedgehog")
MODELS = {"attention": "one attention", "causal": "one causal attention", "encoder": "an encoder of six layers"}
ENGINES = {
    "PyTorch softmax": ("", ""),
    "Lissom softmax": ("eager", "exact"),
    **{f"Lissom {name}": ("eager", f"linear-attention{{features={name}}}") for name in FEATURES},
    "ONNX Runtime softmax": ("onnxruntime", "exact"),
    **{f"ONNX Runtime {name}": ("onnxruntime", f"linear-attention{{features={name}}}") for name in FEATURES},
}
WIDTH, HEADS, LAYERS = 384, 12, 6
LAST = {"the last": (5,), "the last two": (4, 5), "the last three": (3, 4, 5), "all six": tuple(range(6))}
LONG = 256
"""Length of the long texts in tokens."""


@dataclass(frozen=True)
class Point:
    """One engine at one length; peak_bytes: memory beyond what its process used when the model was built."""

    model: str
    engine: str
    tokens: int
    median_ms: float
    peak_bytes: int

    @property
    def microseconds(self) -> float:
        """Microseconds per token."""
        return 1e3 * self.median_ms / self.tokens


class Attention(nn.Module):
    """Self-attention with its projections."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.project(x).split(WIDTH, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))


def build(name: str) -> tuple[nn.Module, Callable[[int], dict[str, torch.Tensor]]]:
    """A model with random weights, and a function from a number of tokens to its inputs."""
    torch.manual_seed(0)
    if name != "encoder":
        return Attention(name == "causal").eval(), lambda tokens: {"x": torch.randn(1, tokens, WIDTH)}
    config = transformers.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=max(LENGTHS),
    )
    ids = partial(torch.randint, 0, config.vocab_size)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    return model, lambda tokens: {"input_ids": ids((1, tokens)), "attention_mask": torch.ones(1, tokens, dtype=torch.long)}


def measure(model: str, engine: str, lengths: Sequence[int], seconds: float, most_scores: float) -> Iterator[Point]:
    """The points of one engine, in this process."""
    backend, passes = ENGINES[engine]
    module, inputs = build(model)
    call = module
    if backend:
        call = lissom.compile(module, inputs(64), passes=passes, backend=backend, checks="structural", goal=None)
    before = held_bytes()
    for tokens in lengths:
        if backend == "onnxruntime" and passes == "exact" and 4e-9 * HEADS * tokens**2 > most_scores:
            return
        given = inputs(tokens)
        with torch.inference_mode():
            yield Point(model, engine, tokens, _median_ms(partial(call, **given), seconds), peak_bytes() - before)


def held_bytes() -> int:
    """Current and peak memory of this process; the peak is reset first, which needs Linux."""
    with suppress(OSError):
        reset_peak()
    return peak_bytes()


def _median_ms(call: Callable[[], object], seconds: float) -> float:
    """The median of the calls within the time limit; of calls that take far longer, the second only."""
    call()
    started = time.perf_counter()
    call()
    elapsed = time.perf_counter() - started
    return 1e3 * elapsed if elapsed > seconds else time_calls({"call": call}, seconds)["call"].median_ms


def run_worker(model: str, engine: str, options: argparse.Namespace) -> Iterator[Point]:
    """The points of one engine, in a process of its own; those finished if it crashes."""
    request = ["--worker", model, engine, "--lengths", *map(str, options.lengths), "--seconds", str(options.seconds)]
    request += ["--threads", str(options.threads), "--most-scores", str(options.most_scores)]
    with subprocess.Popen([sys.executable, __file__, *request], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield Point(**json.loads(line))
    if process.returncode:
        print(f"{model}, {engine}: the process ended with status {process.returncode}", file=sys.stderr)


def speed_table(points: Sequence[Point], model: str, lengths: Sequence[int]) -> str:
    """Microseconds per token of every engine at every length, and the memory of the longest text."""
    heads = ["engine", *(f"{tokens:,}" for tokens in lengths), "MB at the longest"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for engine in ENGINES:
        by_length = {point.tokens: point for point in points if (point.model, point.engine) == (model, engine)}
        if by_length:
            cells = [f"{by_length[tokens].microseconds:.3g}" if tokens in by_length else "" for tokens in lengths]
            longest = by_length[max(by_length)]
            lines.append(f"| {engine} | {' | '.join(cells)} | {longest.peak_bytes / 1e6:.0f} |")
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], file: Path) -> None:
    """Microseconds per token against the length, a panel per model: softmax in grey and black, ONNX Runtime dashed."""
    models = [name for name in MODELS if any(point.model == name for point in points)]
    figure, panels = subplots(1, len(models), squeeze=False, figsize=(4.4 * len(models), 4))
    colours = {"softmax": "black", "elu": "tab:blue", "relu": "tab:green", "hedgehog": "tab:red"}
    for panel, model in zip(panels[0], models, strict=True):
        for engine in ENGINES:
            curve = [point for point in points if (point.model, point.engine) == (model, engine)]
            colour = "tab:gray" if engine.startswith("PyTorch") else colours[engine.rpartition(" ")[2]]
            style = "--" if engine.startswith("ONNX") else "-"
            xs, ys = [point.tokens for point in curve], [point.microseconds for point in curve]
            panel.plot(xs, ys, style, color=colour, marker=".", label=engine)
        panel.set(title=MODELS[model], xlabel="tokens", xscale="log", yscale="log")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("µs a token")
    panels[0][0].legend(fontsize=7)
    save(figure, file)


def quality_table(pairs: int | None, calibration: int, chosen: Sequence[str]) -> str:
    """The agreement with softmax weights, retrieval and embeddings, by feature map and layers."""
    checkpoint = load("minilm")
    texts = read_pairs("evaluation", pairs)
    original, long = retrieve(checkpoint.model, checkpoint, texts), long_texts(checkpoint, texts.glosses, LONG)
    whole = embed(checkpoint.model, checkpoint, long)
    other = read_pairs("calibration", 600)
    data = calibration_batches(checkpoint, calibration)
    data += [checkpoint.encode([text]) for text in long_texts(checkpoint, other.glosses + other.examples, LONG)[:16]]
    heads = (
        "features",
        "layers",
        "mass that stays",
        "divergence, nats",
        "recall@10, change (95 %)",
        "cosine",
        f"at {LONG} tokens",
        "s",
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for features in chosen:
        for title, layers in LAST.items():
            only = ",".join(f"encoder.layer.{layer}" for layer in layers)
            passes, started = f'linear-attention{{features={features},only="{only}"}}', time.perf_counter()
            result = lissom.optimize(checkpoint.model, checkpoint.example_inputs, passes=passes, data=data, checks="structural")
            seconds = time.perf_counter() - started
            told = re.findall(r" (\d+)% and ([\d.e-]+)", " ".join(result.report.history.steps[-1].notes))
            masses, divergences = ([float(pair[side]) for pair in told] for side in (0, 1))
            retrieval = retrieve(result.program, checkpoint, texts)
            change, low, high = difference(original, retrieval, 10)
            near = float((whole * embed(result.program, checkpoint, long)).sum(-1).mean())
            cells = [features, title, f"{sum(masses) / len(masses):.0f}%", f"{sum(divergences) / len(divergences):.2g}"]
            cells += [f"{change:+.1%} ({low:+.1%} to {high:+.1%})", f"{float(cosine(original, retrieval).mean()):.4f}"]
            lines.append(f"| {' | '.join([*cells, f'{near:.4f}', f'{seconds:.0f}'])} |")
            print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def report(points: Sequence[Point], quality: str, lengths: Sequence[int]) -> str:
    """All tables in the form of benchmarks/README.md."""
    parts: list[str] = []
    for name, title in MODELS.items():
        if any(point.model == name for point in points):
            parts.append(f"Microseconds a token, {title}:\n\n{speed_table(points, name, lengths)}")
    if points:
        parts.append(f"![microseconds a token of every engine against the length]({FIGURE.name})\n")
    if quality:
        parts.append(f"all-MiniLM-L6-v2, not trained:\n\n{quality}")
    return "\n".join([*parts, f"{conditions()}.", ""])


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="%(default)s by default")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE", help="by name")
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="%(default)s by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per engine and length")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--most-scores", type=float, default=4.0, help="GB of scores allowed on ONNX Runtime; %(default)s by default"
    )
    parser.add_argument("--features", nargs="*", default=list(FEATURES), help="feature maps for the quality table")
    parser.add_argument("--pairs", type=int, default=2000, help="evaluated synsets; %(default)s by default")
    parser.add_argument("--texts", type=int, default=1000, help="short calibration texts; %(default)s by default")
    parser.add_argument("--update", action="store_true", help="put the tables into benchmarks/README.md, and draw the figure")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        model, engine = options.worker
        for point in measure(model, engine, sorted(options.lengths), options.seconds, options.most_scores):
            print(json.dumps(asdict(point)), flush=True)
        return
    points: list[Point] = []
    for model in options.models:
        for engine in options.engines:
            for point in run_worker(model, engine, options):
                points.append(point)
                print(point, file=sys.stderr, flush=True)
    printed = report(
        points, quality_table(options.pairs, options.texts, options.features) if options.features else "", options.lengths
    )
    print(printed)
    if options.update:
        put_table("linear_attention", printed)
        if points:
            draw(points, FIGURE)


if __name__ == "__main__":
    main()
