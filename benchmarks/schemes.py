"""Quality, bytes and latency of every scheme of `quantize`, on an encoder and a decoder: docs/schemes/*.md.

    python benchmarks/schemes.py minilm
    python benchmarks/schemes.py gemma3-270m
    python benchmarks/schemes.py --write

Each row is added to schemes.json as soon as it is measured, and a run continues where the last one stopped; `--again` starts
over. Quality is that of quality.py, of the compiled model if the CPU backend has kernels, else of the simulated program.
Latency is relative to our own float32 program on the same backend, the two timed in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from curves import TITLES
from quality import (
    calibration_batches,
    conditions,
    cosine,
    decoder_batches,
    difference,
    latency_share,
    losses,
    perplexity_change,
    read_pairs,
    retrieve,
    timed_inputs,
    windows,
)

import lissom
from lissom.artifacts.weights import stored_bytes
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import UnsupportedError
from lissom.frontends.models.huggingface import Checkpoint, load
from lissom.io.files import write_whole
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

HERE = Path(__file__).parent
RECORDS = HERE / "schemes.json"
PAGES = HERE.parent / "docs" / "schemes"
BACKENDS = {"minilm": ("eager", "onnxruntime"), "gemma3-270m": ("eager",)}
SHAPES = {"minilm": ((1, 32), (8, 128)), "gemma3-270m": ((1, 1), (1, 128))}
TEXTS, TOKENS, EVALUATED = 100, 8192, 4096
"""Calibration texts of the encoder, calibration tokens of the decoder, and tokens it is evaluated on."""
SECONDS = 4.0


@dataclass(frozen=True)
class Scheme:
    """A page: the scheme, when not to use it, and the pipelines measured on each model."""

    about: str
    avoid: str
    minilm: Sequence[str]
    gemma: Sequence[str]

    def pipelines(self, model: str) -> Sequence[str]:
        """The pipelines of a model."""
        return self.minilm if model == "minilm" else self.gemma


SCHEMES = {
    "int8-dynamic": Scheme(
        "W8A8: weights in int8 with per-channel scales, activations in uint8 with per-token scales and zero points that are "
        "computed at run time. It needs no calibration data. Matrix products run in integers.",
        "- For decode, one token at a time: it is bound by reading weights, and `int4-dynamic` reads half.\n"
        "- Where some features are far larger than others, as in decoders: `int8-group` rounds those by themselves.\n"
        "- Where a tenth of a percent of quality counts: `int8-weight` keeps activations in floating point.",
        ("quantize{scheme=int8-dynamic}", "quantize{scheme=int8-dynamic,activations=tensor}"),
        ("quantize{scheme=int8-dynamic}",),
    ),
    "int8-group": Scheme(
        "W8A8 with activations in int8 that have a scale per group of 32, computed at run time; weights as for "
        "`int8-dynamic`. Where some features are far larger than others, as in decoders, only their own group is rounded "
        "coarsely.",
        "- For prefill and large batches: the sum of each group is scaled by itself, see the longer shape.\n"
        "- For encoders: `int8-dynamic` loses next to nothing there.\n"
        "- On CUDA: there are no such products, and the scheme is refused. ONNX Runtime has them in `MatMulNBits`.",
        ("quantize{scheme=int8-group}",),
        ("quantize{scheme=int8-group}", "quantize{scheme=int8-group,embeddings=true}"),
    ),
    "int8-static": Scheme(
        "W8A8 as `int8-dynamic`, with per-tensor activation scales and zero points that an observer chooses from calibration "
        "data. `smooth-quant` before it moves activation outliers into weights.",
        "- Without calibration data that "
        "resembles later inputs: values outside its range are clipped.\n"
        "- On values with outliers, as the residual streams of most transformers have: a per-tensor scale has "
        "several times the error of per-token scales, see the table.\n"
        "- For speed alone: computing scales at run time is a small part of a layer, see the last columns of both pages.",
        (
            "quantize{scheme=int8-static}",
            "quantize{scheme=int8-static,observer=mse}",
            "smooth-quant,quantize{scheme=int8-static}",
        ),
        ("smooth-quant,quantize{scheme=int8-static}",),
    ),
    "int8-weight": Scheme(
        "Weight-only int8 (W8A16) with per-channel or per-group scales; activations stay in floating point, and weights are "
        "dequantized in registers.",
        "- For prefill and large batches: products run in floating point, no "
        "faster, see the longer shape.\n"
        "- Where memory counts more than a percent of quality: `int4-weight` takes half of it.",
        ("quantize{scheme=int8-weight}", "quantize{scheme=int8-weight,embeddings=true}"),
        ("quantize{scheme=int8-weight}", "quantize{scheme=int8-weight,granularity=group,embeddings=true}"),
    ),
    "int4-weight": Scheme(
        "Weight-only int4 (W4A16) with a scale and a zero point per group of 32. `gptq` after it and `awq` before it reduce "
        "the error with calibration data.",
        "- Without data for `gptq` or `awq` where quality counts: the loss of round-to-nearest "
        "is many times as large.\n"
        "- For prefill and large batches: products run in floating point, no faster.\n"
        "- For encoders whose embeddings are compared with those of the original: the error of int8 is smaller by an "
        "order of magnitude.",
        (
            "quantize{scheme=int4-weight}",
            "quantize{scheme=int4-weight},gptq",
            "awq,quantize{scheme=int4-weight}",
        ),
        ("quantize{scheme=int4-weight,embeddings=false}", "quantize{scheme=int4-weight,embeddings=false},gptq"),
    ),
    "int4-dynamic": Scheme(
        "W4A8: weights in int4 with a scale and a zero point per group of 32, activations in int8 as for `int8-group`. "
        "Products run in integers: four bits become bytes in registers, and the sum of each group is scaled. `gptq` after it "
        "and `awq` before it reduce the error of the weights with calibration data.",
        "- Without data for `gptq` or `awq` where quality counts: the loss of round-to-nearest "
        "is many times as large.\n"
        "- For prefill and large batches: `int8-dynamic` has fewer sums to scale, and a smaller error.\n"
        "- On CUDA: there are no such products, and the scheme is refused; `int4-weight` runs there. ONNX Runtime has them in "
        "`MatMulNBits`.",
        ("quantize{scheme=int4-dynamic}", "quantize{scheme=int4-dynamic},gptq"),
        ("quantize{scheme=int4-dynamic}", "quantize{scheme=int4-dynamic},gptq{tables=false}"),
    ),
    "fp8": Scheme(
        "Weights and activations in fp8 (e4m3, four bits of exponent and three of fraction), with per-channel and per-token "
        "scales. The largest value is 448.",
        "- On a CPU: no processor multiplies fp8, and the scheme is "
        "refused; `simulate=True` computes the same numbers in floating point, to measure the quality.\n"
        "- For weights that fit int8: within one channel int8 has finer steps, see the cosine of both.",
        ("quantize{scheme=fp8}",),
        ("quantize{scheme=fp8}",),
    ),
    "mxfp4-weight": Scheme(
        "Weight-only fp4 (e2m1) with a scale per block of 32 that is a power of two: 4.25 bits per weight, in the format of "
        "the OCP Microscaling specification. GGUF files have it as MXFP4. `gptq` after it reduces the error with calibration "
        "data.",
        "- Where quality counts: the largest values of a block saturate, since its scale is a power of two that is rounded "
        "down. `int4-weight` has zero points, and scales that are searched.\n"
        "- For speed: the kernel takes as long as that of `int4-weight`.\n"
        "- With ONNX Runtime: it has no kernel of fp4 on a CPU, and the scheme is refused.",
        ("quantize{scheme=mxfp4-weight}", "quantize{scheme=mxfp4-weight},gptq"),
        ("quantize{scheme=mxfp4-weight,embeddings=false}",),
    ),
    "mxfp8-weight": Scheme(
        "Weight-only fp8 (e4m3) with a scale per block of 32 that is a power of two: 8.25 bits per weight, in the format of "
        "the OCP Microscaling specification.",
        "- Where int8 will do: `int8-weight` has finer steps for weights of similar size, in the same time or less.\n"
        "- With ONNX Runtime: the scheme is refused.",
        ("quantize{scheme=mxfp8-weight}",),
        ("quantize{scheme=mxfp8-weight}",),
    ),
    "nvfp4-weight": Scheme(
        "Weight-only fp4 (e2m1) with an e4m3 scale per block of 16 and one float32 scale per tensor: 4.5 bits per weight, in "
        "the format of NVFP4 checkpoints. `gptq` after it reduces the error with calibration data.",
        "- For speed: there are twice as many scales to read as with `int4-weight`.\n"
        "- With ONNX Runtime: it has no kernel of fp4 on a CPU, and the scheme is refused.\n"
        "- For GGUF files: they are written in floating point.",
        ("quantize{scheme=nvfp4-weight}", "quantize{scheme=nvfp4-weight},gptq"),
        ("quantize{scheme=nvfp4-weight,embeddings=false}",),
    ),
}


@dataclass(frozen=True)
class Row:
    """One pipeline on one model.

    quality: cells of the model's columns. size: bytes of the weights in an artifact relative to float32. latency: by backend
    and shape, relative to float32; an error if the backend refuses. seconds: of the passes.
    """

    model: str
    passes: str
    quality: list[str]
    size: float
    latency: dict[str, str]
    seconds: float
    machine: str


HEADS = {"minilm": ("recall@1, change (95 %)", "cosine"), "gemma3-270m": ("perplexity", "change (± standard error)")}


def read_rows() -> list[Row]:
    """The rows measured so far."""
    return [Row(**fields) for fields in json.loads(RECORDS.read_text(encoding="utf-8"))] if RECORDS.exists() else []


def measure(model: str) -> None:
    """Measure the missing rows of a model."""
    checkpoint = load(model)
    data = calibration_batches(checkpoint, TEXTS) if model == "minilm" else decoder_batches(checkpoint, TOKENS)
    inputs = {shape: timed_inputs(model, checkpoint, *shape) for shape in SHAPES[model]}
    score = scorer(model, checkpoint)
    whole = {
        name: lissom.compile(checkpoint.model, checkpoint.example_inputs, backend=name, checks="structural")
        for name in BACKENDS[model]
    }
    for passes in (pipeline for scheme in SCHEMES.values() for pipeline in scheme.pipelines(model)):
        if any((row.model, row.passes) == (model, passes) for row in read_rows()):
            continue
        started = time.perf_counter()
        rounded = lissom.optimize(
            checkpoint.model, checkpoint.example_inputs, passes=passes, data=data, checks="structural"
        ).program
        seconds = time.perf_counter() - started
        stored, _ = Pipeline([FoldQuantizedWeights()], checks="structural").run(rounded)
        latency: dict[str, str] = {}
        judged: Callable[..., object] = rounded
        for name, unrounded in whole.items():
            try:
                fast = lissom.compile(
                    checkpoint.model,
                    checkpoint.example_inputs,
                    passes=passes,
                    data=data,
                    backend=name,
                    checks="structural",
                    goal=None,
                )
            except UnsupportedError as refusal:
                latency |= {f"{name} {rows}x{tokens}": str(refusal) for rows, tokens in inputs}
                continue
            judged = fast if name == "eager" else judged
            for (rows, tokens), given in inputs.items():
                latency[f"{name} {rows}x{tokens}"] = f"{latency_share(fast, unrounded, given, SECONDS):.2f}"
        row = Row(
            model,
            passes,
            score(judged),
            stored_bytes(stored) / stored_bytes(whole["eager"].program),
            latency,
            seconds,
            conditions(),
        )
        print(row, file=sys.stderr)
        write_whole(RECORDS, json.dumps([asdict(measured) for measured in (*read_rows(), row)], indent=1) + "\n")


def scorer(model: str, checkpoint: Checkpoint) -> Callable[[Callable[..., object]], list[str]]:
    """Returns the function from a callable to its quality cells."""
    if model == "minilm":
        texts = read_pairs("evaluation")
        original = retrieve(checkpoint.model, checkpoint, texts)

        def retrieval(call: Callable[..., object]) -> list[str]:
            reached = retrieve(call, checkpoint, texts)
            change, low, high = difference(original, reached, 1)
            return [f"{change:+.1%} ({low:+.1%} to {high:+.1%})", f"{float(cosine(original, reached).mean()):.4f}"]

        return retrieval
    pieces = windows(checkpoint, "evaluation", EVALUATED)
    base = losses(checkpoint.model, checkpoint, pieces)
    return lambda call: perplexity_change(base, losses(call, checkpoint, pieces))


def page(name: str, rows: Sequence[Row]) -> str:
    """The page of a scheme."""
    scheme = SCHEMES[name]
    lines = ["<!-- Made by benchmarks/schemes.py; change that instead. -->\n", f"# {name}\n", f"{scheme.about}\n"]
    lines += [
        "Options, formulas and sources are with the pass, [quantize](../passes/quantize.md). Round-to-nearest, GPTQ and",
        "AWQ side by side on Gemma 3 270M, by perplexity: [benchmarks](../../benchmarks/README.md#rounding).\n",
    ]
    refusals: dict[str, None] = {}
    for model, title in TITLES.items():
        chosen = [row for passes in scheme.pipelines(model) for row in rows if (row.model, row.passes) == (model, passes)]
        if not chosen:
            continue
        shapes = [f"{backend} {rows}x{tokens}" for backend in BACKENDS[model] for rows, tokens in SHAPES[model]]
        heads = ("passes", *HEADS[model], "bytes", *shapes, "s")
        lines += [f"## {title}\n", f"| {' | '.join(heads)} |", "|---" + "|---:" * (len(heads) - 1) + "|"]
        for row in chosen:
            refusals |= dict.fromkeys(cell for cell in row.latency.values() if not cell[:1].isdigit())
            figures = [cell if cell[:1].isdigit() else "refused" for cell in (row.latency[shape] for shape in shapes)]
            cells = (f"`{row.passes}`", *row.quality, f"{row.size:.2f}", *figures, f"{row.seconds:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"\n{chosen[-1].machine}.\n")
    lines += [f"> {refusal}\n" for refusal in refusals]
    lines += [
        "Bytes are those of the weights in an artifact, and latency is of a call of this many rows and tokens, relative to",
        f"our own program in float32. Quality is described in `benchmarks/quality.py`; {TEXTS} calibration texts, or",
        f"{TOKENS:,} tokens for the decoder. `s`: seconds of the passes, capture included.\n",
        "## When not to use it here\n",
        scheme.avoid,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, then write the pages of all rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", choices=list(TITLES), help="which model to measure")
    parser.add_argument("--write", action="store_true", help="write the pages from the measured rows, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure all rows again")
    options = parser.parse_args()
    if options.again and options.model:
        kept = [asdict(row) for row in read_rows() if row.model != options.model]
        write_whole(RECORDS, json.dumps(kept, indent=1) + "\n")
    if options.model and not options.write:
        measure(options.model)
    rows = read_rows()
    PAGES.mkdir(exist_ok=True)
    for name in SCHEMES:
        write_whole(PAGES / f"{name}.md", page(name, rows))


if __name__ == "__main__":
    main()
