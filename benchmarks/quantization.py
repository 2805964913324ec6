"""The cost of quantization: perplexity of Gemma 3 270M, retrieval and cosine of all-MiniLM-L6-v2, by scheme and method.

    python benchmarks/quantization.py gemma3-270m
    python benchmarks/quantization.py minilm
    python benchmarks/quantization.py gemma3-270m --passes "awq,quantize{scheme=int4-weight},gptq" --tokens 4096

Gemma: perplexity of the evaluated glosses, joined line by line and read in windows, each of which begins with the BOS token.
`stored`: the bytes of all weights after `fold-quantized-weights`, also relative to the GGUF file of the model, in which weights
have 4 to 8 bits. Its embedding table has 8, in groups of 32: the benchmark says whether int8 in groups of 32 reproduces it bit
for bit.
MiniLM: see quality.py. `s` are the seconds of all passes, the exact ones and, for MiniLM, the capture included.
Calibration texts are those of other synsets. `--update` puts the table into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from quality import WINDOW, conditions, decoder_inputs, losses, minilm_table, perplexity_change, read_pairs, windows
from readme import put_table

import lissom
from lissom.compiler.calibration.observers import weight_scale
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.frontends.models.huggingface import Checkpoint, find_directory, load
from lissom.ops import formats
from lissom.passes import PASSES, RECIPES
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

_TABLES = 'quantize{scheme=int8-weight,granularity=group,group=32,embeddings=true,only="model.embed_tokens,lm_head"}'
_INT4 = "quantize{scheme=int4-weight}"
_ZERO_POINTS = "quantize{scheme=int4-weight,symmetric=false}"
_ALL = "quantize{scheme=int4-weight,symmetric=false,embeddings=true}"
_AWQ = "awq{symmetric=false}"
_GPTQ = "gptq{tables=false}"
MIXED, INT4 = f"{_TABLES},{_ZERO_POINTS},{_GPTQ}", f"{_ALL},gptq"
"""The pipelines that decoder.py times too: int8 embedding tables with int4 layers, and int4 throughout."""
OF_HEAD = 'only="model.embed_tokens,lm_head"'
"""The layers that `own_head` gives formats of their own, as an option of passes."""


def own_head(cast: str, scheme: str) -> str:
    """Passes for an embedding table in int8, an LM head in int4, and the layers in a scheme, after the passes of `cast`."""
    layers = f"quantize{{scheme={scheme},embeddings=false}}"
    table, head = f"scheme=int8-weight,embeddings=true,{OF_HEAD}", f"scheme=int4-dynamic,lm_head=true,{OF_HEAD}"
    return f"untie-lm-head,{cast},{layers},quantize{{{table}}},quantize{{{head}}}"


GEMMA = (
    MIXED,
    INT4,
    f"{_TABLES},{_ZERO_POINTS}",
    f"{_AWQ},{_TABLES},{_ZERO_POINTS}",
    _ALL,
    f"{_AWQ},{_ALL}",
    f"{_AWQ},{_TABLES},{_ZERO_POINTS},{_GPTQ}",
    f"{_AWQ},{_ALL},gptq",
    f"{_ALL},{_GPTQ}",
    f"{_TABLES},{_INT4}",
    f"{_TABLES},{_INT4},{_GPTQ}",
    f"{_TABLES},{_ZERO_POINTS},gptq{{tables=false,asymmetric=false}}",
    f"{_TABLES},{_ZERO_POINTS},gptq{{tables=false,refit=false}}",
    f"{_TABLES},{_ZERO_POINTS},gptq{{tables=false,act_order=false}}",
)
"""The most important pipelines first: the table is printed after each."""
MINILM = (
    "quantize{scheme=int8-dynamic}",
    *(f"quantize{{scheme=int8-static,observer={name}}}" for name in ("min-max", "percentile", "mse", "entropy")),
    "smooth-quant,quantize{scheme=int8-static}",
    "smooth-quant,quantize{scheme=int8-static},correct-bias",
    "equalize,quantize{scheme=int8-dynamic,granularity=tensor}",
    "quantize{scheme=int8-weight}",
    "quantize{scheme=int4-weight}",
    "quantize{scheme=int4-weight},gptq",
    "awq,quantize{scheme=int4-weight}",
    "awq,quantize{scheme=int4-weight},gptq",
    "quantize{scheme=fp8}",
)


def file_bytes(name: str) -> int:
    """The bytes of the GGUF file of a packaged model."""
    return sum(path.stat().st_size for path in find_directory(name).glob("*.gguf"))


def finds_the_grid(checkpoint: Checkpoint) -> bool:
    """Whether int8 in groups of 32 reproduces the embedding table bit for bit."""
    table = checkpoint.model.get_input_embeddings().weight.detach()  # pyright: ignore
    scale, _ = weight_scale(table, (table.shape[0], table.shape[1] // 32), formats.FORMATS["int8"], "min-max")
    rounded = formats.quantize(table, scale.half(), None, formats.FORMATS["int8"])
    return torch.equal(formats.dequantize(rounded, scale.half(), None, table.dtype), table)


def gemma_tables(name: str, pipelines: Sequence[str], calibration: int, evaluation: int) -> Iterator[str]:
    """The perplexity of the program and after each pipeline, as Markdown; yields the table so far after each."""
    checkpoint = load(name)
    dense = lissom.optimize(checkpoint.model, checkpoint.example_inputs, checks="structural").program
    texts = windows(checkpoint, "evaluation", evaluation)
    data = [
        dense.signature.flatten((), decoder_inputs(checkpoint, ids)) for ids in windows(checkpoint, "calibration", calibration)
    ]
    size = file_bytes(name)
    base = losses(dense, checkpoint, texts)
    lines = [
        "| passes | perplexity | change (± standard error) | stored, MB | of the file | s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines.append(f"| none | {float(base.mean().exp()):.2f} | | {dense.parameter_bytes / 1e6:.0f} | | |")
    print(lines[-1], file=sys.stderr, flush=True)
    about = f"{len(base):,} tokens evaluated, {calibration:,} for calibration, windows of {WINDOW}; file: {size / 1e6:.0f} MB"
    grid = "gives" if finds_the_grid(checkpoint) else "does not give"
    about = f"{about}. int8 in groups of 32 {grid} the table of embeddings back to the last bit."
    about += f"\n\n{conditions()}."
    for passes in pipelines:
        started = time.perf_counter()
        chosen = parse_pipeline(passes, PASSES, RECIPES)
        program, _ = Pipeline(chosen, checks="structural", data=data).run(dense)
        seconds = time.perf_counter() - started
        stored, _ = Pipeline([FoldQuantizedWeights()], checks="structural").run(program)
        # Weights are quantized once, not at every call; the numbers are the same.
        quick, _ = Pipeline([FoldConstants()], checks="structural").run(program)
        reached = losses(quick, checkpoint, texts)
        cells = [f"`{passes}`", *perplexity_change(base, reached)]
        cells += [f"{stored.parameter_bytes / 1e6:.1f}", f"{stored.parameter_bytes / size:.3f}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
        yield "\n".join([*lines, "", about]) + "\n"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=["minilm", "gemma3-270m"])
    parser.add_argument("--passes", nargs="*", help="pipelines to measure, one argument each; those of the table by default")
    parser.add_argument("--tokens", type=int, default=20480, help="tokens Gemma is evaluated on; %(default)s by default")
    parser.add_argument("--calibration", type=int, default=65536, help="tokens Gemma is calibrated on; %(default)s by default")
    parser.add_argument("--texts", type=int, default=100, help="calibration texts of MiniLM; %(default)s by default")
    parser.add_argument("--pairs", type=int, help="evaluated synsets of MiniLM; all of them by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    options = parser.parse_args()
    if options.model == "minilm":
        checkpoint = load("minilm")
        printed = minilm_table(checkpoint, options.passes or MINILM, read_pairs("evaluation", options.pairs), options.texts)
        tables = iter([f"{printed}\n{options.texts} calibration texts. {conditions()}.\n"])
    else:
        tables = gemma_tables("gemma3-270m", options.passes or GEMMA, options.calibration, options.tokens)
    printed = ""
    for printed in tables:
        if options.update:
            put_table(f"quantization {options.model}", printed)
    print(printed)


if __name__ == "__main__":
    main()
