"""BERT and a Llama of 1.1 billion parameters on a CUDA device: latency, memory and error of Lissom, PyTorch and torch.compile.

    python benchmarks/gpu.py --models bert-base --dtypes float16 --update
    python benchmarks/gpu.py --dtypes bfloat16 --engines lissom lissom-int8 lissom-int8-inductor --update

Random weights, 128 tokens without padding; the Llama runs a prefill. Each engine runs in a process of its own, which first
runs the model in float32 for comparison. Prints a Markdown table; `--update` puts it into benchmarks/README.md.
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
from readme import put_table
from torch import nn

import lissom
from lissom.measure.timing import time_calls

BATCHES = (1, 8, 64)
SEQUENCE = 128
VOCABULARY = 30_000
SECONDS = 3.0

Inputs = dict[str, torch.Tensor]
Call = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """One engine at one batch size.

    median, low, high: milliseconds per call, median and quartiles. cosine: of the whole output to float32.
    memory: device bytes the process uses after the calls, minus those before it had a model.
    """

    batch: int
    median: float
    low: float
    high: float
    cosine: float
    memory: int


def bert(layers: int, width: int, heads: int) -> nn.Module:
    """An encoder with random weights."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return transformers.BertModel(config)


def llama() -> nn.Module:
    """A decoder of 1.1 billion parameters, the shape of Llama 3.2 1B."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert-base": lambda: bert(12, 768, 12),
    "bert-large": lambda: bert(24, 1024, 16),
    "llama-1b": llama,
}


def eager(model: nn.Module) -> Call:
    """PyTorch eager."""
    return lambda inputs: model(**inputs)[0]


def torch_compile(model: nn.Module) -> Call:
    """TorchInductor at its best setting: kernels tuned, CUDA graphs, one compile per shape."""
    compiled = torch.compile(model, mode="max-autotune", dynamic=False)
    return lambda inputs: compiled(**inputs)[0]


def lissom_on(backend: str, model: nn.Module, passes: str = "exact") -> Call:
    """Lissom with all sizes dynamic, compiled once; lossy passes are kept even if they are slower."""
    compiled = lissom.compile(model, inputs_of(8), backend=backend, passes=passes, goal=None)
    return lambda inputs: compiled(**inputs)[0]  # pyright: ignore[reportIndexIssue]


SCHEMES = {"int8": "int8-dynamic", "fp8": "fp8", "int4": "int4-weight"}
"""Quantization by short name; int4 requires bfloat16."""


def quantized(scheme: str, backend: str) -> Callable[[nn.Module], Call]:
    """Lissom with quantized layers."""
    return lambda model: lissom_on(backend, model, f"quantize{{scheme={SCHEMES[scheme]}}}")


ENGINES: dict[str, Callable[[nn.Module], Call]] = {
    "eager": eager,
    "torch.compile": torch_compile,
    "lissom": lambda model: lissom_on("eager", model),
    "lissom-inductor": lambda model: lissom_on("inductor", model),
    **{f"lissom-{scheme}": quantized(scheme, "eager") for scheme in SCHEMES},
    **{f"lissom-{scheme}-inductor": quantized(scheme, "inductor") for scheme in SCHEMES},
}
TITLES = {
    "eager": "PyTorch",
    "torch.compile": "torch.compile, max-autotune",
    "lissom": "Lissom, CUDA graphs",
    "lissom-inductor": "Lissom, inductor",
    **{f"lissom-{scheme}": f"Lissom, {scheme}, CUDA graphs" for scheme in SCHEMES},
    **{f"lissom-{scheme}-inductor": f"Lissom, {scheme}, inductor" for scheme in SCHEMES},
}


def inputs_of(batch: int) -> Inputs:
    """Random tokens, equal at every call."""
    ids = torch.randint(0, VOCABULARY, (batch, SEQUENCE), generator=torch.Generator().manual_seed(batch))
    return {"input_ids": ids.cuda(), "attention_mask": torch.ones_like(ids).cuda()}


def build(model: str, dtype: torch.dtype) -> nn.Module:
    """The model on the device; its weights are drawn in float32, the same for every dtype."""
    torch.manual_seed(0)
    return MODELS[model]().eval().to("cuda", dtype)


def held() -> int:
    """Bytes of device memory in use."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(model: str, dtype: str, engine: str) -> list[Result]:
    """Measure the engine at every batch size; this process does nothing else."""
    with torch.inference_mode():
        exact = build(model, torch.float32)
        wanted = {batch: exact(**inputs_of(batch))[0].cpu() for batch in BATCHES}
    del exact
    torch.cuda.empty_cache()
    before = held()
    call = ENGINES[engine](build(model, getattr(torch, dtype)))
    return [measure_batch(call, batch, wanted[batch], before) for batch in BATCHES]


def measure_batch(call: Call, batch: int, wanted: torch.Tensor, before: int) -> Result:
    """Latency, error and memory of one engine at one batch size."""
    inputs = inputs_of(batch)
    with torch.inference_mode():
        # The first calls compile, tune and record CUDA graphs.
        for _ in range(3):
            output = call(inputs).cpu()
        torch.cuda.empty_cache()
        timing = time_calls({"": lambda: call(inputs)}, SECONDS)[""]
    a, b = wanted.double().flatten(), output.double().flatten()
    cosine = float(a @ b / (a.norm() * b.norm()))
    return Result(batch, timing.median_ms, timing.low_ms, timing.high_ms, cosine, held() - before)


def measure_apart(model: str, dtype: str, engine: str) -> list[Result] | str:
    """Run `measure` in a process of its own; the last line of its error output if it fails."""
    try:
        return [Result(**fields) for fields in run_apart(__file__, ["--one", model, dtype, engine])]  # pyright: ignore
    except RuntimeError as error:
        return str(error)


def rows(model: str, dtype: str, engine: str) -> list[str]:
    """The engine's rows of the table."""
    results = measure_apart(model, dtype, engine)
    start = f"| {model} | {dtype} | {TITLES[engine]} |"
    if isinstance(results, str):
        return [f"{start} | failed: {results.replace('|', '/')} | | |"]
    return [
        f"{start} {result.batch} | {result.median:.2f} ({result.low:.2f} to {result.high:.2f}) | {result.cosine:.6f} | "
        f"{result.memory / 1e9:.2f} |"
        for result in results
    ]


def table(models: list[str], dtypes: list[str], engines: list[str]) -> str:
    """The results as Markdown, with the machine."""
    heads = "model | dtype | engine | batch | ms (middle half) | cosine to float32 | memory, GB"
    lines = [f"| {heads} |", "|---|---|---|---:|---:|---:|---:|"]
    for model in models:
        for dtype in dtypes:
            for engine in engines:
                print(f"{model}, {dtype}, {engine}", file=sys.stderr)
                lines += rows(model, dtype, engine)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return "\n".join([*lines, "", f"{torch.cuda.get_device_name()}; {versions}; {SEQUENCE} tokens."]) + "\n"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", choices=["float16", "bfloat16"], default=["float16", "bfloat16"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "DTYPE", "ENGINE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark measures on a CUDA device, and PyTorch finds none here; run it on a machine with one")
    if options.one:
        print(json.dumps([asdict(result) for result in measure(*options.one)]))
        return
    printed = table(options.models, options.dtypes, options.engines)
    print(printed)
    if options.update:
        put_table("gpu", printed)


if __name__ == "__main__":
    main()
