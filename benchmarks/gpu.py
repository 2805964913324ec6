"""BERT, a vision transformer and a Llama on a CUDA device: latency, memory and error of Lissom, PyTorch and torch.compile.

    python benchmarks/gpu.py --models bert-base --dtypes float16 --update
    python benchmarks/gpu.py --dtypes bfloat16 --engines lissom lissom-int8 lissom-int8-inductor --update

Random weights, 128 tokens without padding or an image; the Llama runs a prefill. Each engine runs in a process of its own,
which first runs the model in float32 for comparison. Prints a Markdown table; `--update` puts it into benchmarks/README.md.
The rows are listed in gpu_rows.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import transformers
from apart import run_apart
from gpu_rows import BATCHES, DTYPES, ROWS, SCHEMES, SEQUENCE, SHAPES, TINY, TITLES, Inputs, Row, scheme_of
from readme import put_table
from torch import nn
from torch.nn import functional

import lissom
from lissom.measure.timing import time_calls

SECONDS = 3.0
"""Measuring time of one engine at one batch size."""

Call = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """One engine at one batch size.

    median, low, high: milliseconds per call, median and quartiles; None on the pretended GPU. cosine: of the whole output to
    float32. memory: device bytes the process uses after the calls, minus those before it had a model. failed: the error of
    this batch, without figures.
    """

    batch: int
    median: float | None = None
    low: float | None = None
    high: float | None = None
    cosine: float | None = None
    memory: int | None = None
    failed: str | None = None


def eager(model: nn.Module) -> Call:
    """PyTorch eager."""
    return lambda inputs: model(**inputs)[0]


def torch_compile(model: nn.Module) -> Call:
    """TorchInductor at its best setting: kernels tuned, CUDA graphs, one compile per shape."""
    compiled = torch.compile(model, mode="max-autotune", dynamic=False)
    return lambda inputs: compiled(**inputs)[0]


def lissom_on(backend: str, model: nn.Module, example: Inputs, passes: str = "exact") -> Call:
    """Lissom with all sizes dynamic, compiled once; lossy passes are kept even if they are slower."""
    compiled = lissom.compile(model, example, backend=backend, passes=passes, goal=None)
    return lambda inputs: compiled(**inputs)[0]  # pyright: ignore[reportIndexIssue]


def call_of(engine: str, model: nn.Module, example: Inputs) -> Call:
    """The model on an engine of `TITLES`."""
    if engine in ("eager", "torch.compile"):
        return eager(model) if engine == "eager" else torch_compile(model)
    scheme = scheme_of(engine)
    passes = "exact" if scheme is None else f"quantize{{scheme={SCHEMES[scheme]}}}"
    return lissom_on("inductor" if engine.endswith("-inductor") else "eager", model, example, passes)


PRETENDED = False
"""True on the pretended GPU, which has tiny models, and whose calls are not timed."""


def inputs_of(model: str, batch: int) -> Inputs:
    """Random inputs on the device, equal at every call."""
    sizes = {"sequence": 24 if SHAPES[model].sequence else None, "image": TINY[model].get("image", 224)} if PRETENDED else {}
    return {name: tensor.cuda() for name, tensor in SHAPES[model].inputs(batch, **sizes).items()}


def build(model: str, dtype: torch.dtype) -> nn.Module:
    """The model on the device; its weights are drawn in float32, the same for every dtype."""
    return SHAPES[model].build(**(TINY[model] if PRETENDED else {})).to("cuda", dtype)


def held() -> int:
    """Bytes of device memory in use."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(model: str, dtype: str, engine: str, seconds: float) -> list[Result]:
    """Measure the engine at every batch size; this process does nothing else."""
    exact = build(model, torch.float32)
    with torch.inference_mode():
        wanted = {batch: exact(**inputs_of(model, batch))[0].cpu() for batch in BATCHES}
    del exact
    torch.cuda.empty_cache()
    before = held()
    call = call_of(engine, build(model, getattr(torch, dtype)), inputs_of(model, 8))
    return [measure_batch(call, inputs_of(model, batch), wanted[batch], before, seconds) for batch in BATCHES]


def measure_batch(call: Call, inputs: Inputs, wanted: torch.Tensor, before: int, seconds: float) -> Result:
    """Latency, error and memory of one engine at one batch size; a batch too large for the device costs only itself."""
    batch = len(wanted)
    try:
        with torch.inference_mode():
            # The first calls compile, tune and record CUDA graphs.
            for _ in range(3):
                output = call(inputs).cpu()
            torch.cuda.empty_cache()
            cosine = functional.cosine_similarity(wanted.double().flatten(), output.double().flatten(), dim=0).item()
            if PRETENDED:
                return Result(batch, cosine=cosine)
            timing = time_calls({"": lambda: call(inputs)}, seconds)[""]
    except torch.OutOfMemoryError as error:
        return Result(batch, failed=f"out of memory: {str(error).partition('.')[0]}")
    return Result(batch, timing.median_ms, timing.low_ms, timing.high_ms, cosine, held() - before)


def longest_kernels(model: str, dtype: str, engine: str, batch: int = 8) -> list[dict[str, object]]:
    """The ten kernels that take the most time of a call: name, launches, and milliseconds of a call on a GPU.

    The pretended GPU has no kernels; its operators are listed by their number of calls.
    """
    call = call_of(engine, build(model, getattr(torch, dtype)), inputs_of(model, batch))
    inputs, calls = inputs_of(model, batch), 1 if PRETENDED else 5
    activities = [torch.profiler.ProfilerActivity.CPU if PRETENDED else torch.profiler.ProfilerActivity.CUDA]
    with torch.inference_mode():
        for _ in range(3):
            call(inputs)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(calls):
                call(inputs)
            torch.cuda.synchronize()
    events = list(profile.key_averages())
    if PRETENDED:
        most = sorted(events, key=lambda event: -event.count)[:10]
        return [{"kernel": event.key, "launches": event.count} for event in most]
    most = sorted(events, key=lambda event: -event.self_device_time_total)[:10]
    return [
        {"kernel": event.key, "launches": event.count / calls, "ms": event.self_device_time_total / calls / 1e3}
        for event in most
    ]


def measure_apart(model: str, dtype: str, engine: str) -> list[Result] | str:
    """Run `measure` in a process of its own; the last line of its error output if it fails."""
    arguments = ["--one", model, dtype, engine, "--seconds", str(SECONDS)]
    try:
        return [Result(**fields) for fields in run_apart(__file__, arguments)]  # pyright: ignore
    except RuntimeError as error:
        return str(error)


def lines_of(row: Row, results: list[Result] | str) -> list[str]:
    """The row of the table at each batch size, or the error of all of them."""
    start = f"| {row.model} | {row.dtype} | {TITLES[row.engine]} |"
    if isinstance(results, str):
        return [f"{start} | failed: {results.replace('|', '/')} | | |"]
    return [f"{start} {result.batch} | {_figures(result)} |" for result in results]


def _figures(result: Result) -> str:
    if result.failed is not None:
        return f"failed: {result.failed.replace('|', '/')} | |"
    if result.median is None:
        return f"not timed | {result.cosine:.6f} |"
    times = f"{result.median:.2f} ({result.low:.2f} to {result.high:.2f})"
    return f"{times} | {result.cosine:.6f} | {(result.memory or 0) / 1e9:.2f}"


HEAD = """| model | dtype | engine | batch | ms (middle half) | cosine to float32 | memory, GB |
|---|---|---|---:|---:|---:|---:|"""


def table(rows: list[Row]) -> str:
    """The results as Markdown, with the machine."""
    lines = [HEAD]
    for row in rows:
        print(row, file=sys.stderr)
        lines += lines_of(row, measure_apart(row.model, row.dtype, row.engine))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join([*lines, "", f"{torch.cuda.get_device_name()}; {versions}; {SEQUENCE} tokens."]) + "\n"


def run(options: argparse.Namespace) -> None:
    """Measure what the options name and print it."""
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures on a CUDA device, and PyTorch finds none here; run it on a machine with one")
    if options.one:
        print(json.dumps([asdict(result) for result in measure(*options.one, seconds=options.seconds)]))
        return
    if options.profile:
        print(json.dumps(longest_kernels(*options.profile)))
        return
    chosen = [
        row for row in ROWS if row.model in options.models and row.dtype in options.dtypes and row.engine in options.engines
    ]
    if not chosen:
        sys.exit("the table has no such row: quantized layers run in bfloat16 and float16, int4 in bfloat16 only")
    chosen.sort(key=lambda row: (options.models.index(row.model), options.dtypes.index(row.dtype)))
    printed = table(chosen)
    print(printed)
    if options.update:
        put_table("gpu", printed)


def main() -> None:
    """Measure and print the table."""
    global PRETENDED
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--engines", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="measuring time of an engine at a batch size")
    triple = ("MODEL", "DTYPE", "ENGINE")
    parser.add_argument("--profile", nargs=3, metavar=triple, help="print the ten longest kernels at a batch of 8, as JSON")
    parser.add_argument("--one", nargs=3, metavar=triple, help=argparse.SUPPRESS)
    parser.add_argument("--pretend", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    PRETENDED = options.pretend
    if not PRETENDED:
        run(options)
        return
    from tools.pretend_cuda import pretend_cuda

    with pretend_cuda(capability=(9, 0)):
        run(options)


if __name__ == "__main__":
    main()
