"""Peak memory of what is done with a model beside compiling it: search, training, and export.

    python benchmarks/compile_paths.py --update
    python benchmarks/compile_paths.py --paths tune "compile, fastest"

BERT-base and a decoder of the shape of SmolLM2-135M with random weights, and Gemma 3 270M for GGUF, in float32, each path in a
process of its own. Prints a Markdown table; `--update` puts it into benchmarks/README.md. Memory is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from apart import run_apart
from compile_models import build, calibration, example_inputs, texts, weight_bytes
from compile_time import machine, warm_up
from memory import reset_peak, used_memory
from readme import put_table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lissom
from lissom.frontends.models.huggingface import load

_MINUTES = 1.0
"""The length of a search."""


@dataclass(frozen=True)
class PathCost:
    """The cost of one path.

    weight_bytes: of the model. peak: bytes of the process above those it used with the model built.
    """

    path: str
    weight_bytes: int
    peak: int


def decoder() -> LlamaForCausalLM:
    """A decoder of the shape of SmolLM2-135M, its head tied to the table."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    ).eval()


def _encoder() -> nn.Module:
    return build("BERT-base")


def _compile(passes: str, **options: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: lissom.compile(model, example_inputs("BERT-base"), passes=passes, **options)


def _distill(model: nn.Module, _: Path) -> object:
    passes = "prune-heads{keep=0.75},distill{steps=8}"
    return lissom.compile(model, example_inputs("BERT-base"), passes=passes, data=calibration("BERT-base"))


def _tune(model: nn.Module, _: Path) -> object:
    data = calibration("BERT-base")
    return lissom.tune(model, data[0], data=data, max_drop=0.1, minutes=_MINUTES, distill=False)


def _save(model: nn.Module, folder: Path) -> None:
    lissom.compile(model, example_inputs("BERT-base")).save(folder / "saved")


def _export_onnx(model: nn.Module, folder: Path) -> None:
    compiled = lissom.compile(model, example_inputs("BERT-base"), backend="onnxruntime")
    compiled.export_onnx(folder / "onnx", dtypes=["fp32"])


def _generation(model: LlamaForCausalLM, _: Path) -> object:
    return lissom.compile_generation(model, max_length=256)


def _tune_generation(model: LlamaForCausalLM, _: Path) -> object:
    data = texts(4, 64)["input_ids"]
    return lissom.tune_generation(model, max_length=256, data=data, minutes=_MINUTES, distill=False)


def _gemma() -> nn.Module:
    return load("gemma3-270m", with_inputs=False).model


def _export_gguf(model: nn.Module, folder: Path) -> None:
    optimized = lissom.optimize(model, {"input_ids": texts(1, 16)["input_ids"], "use_cache": False})
    optimized.export_gguf(folder / "model.gguf", dtype="f16")


PATHS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[Any, Path], object]]] = {
    "compile": (_encoder, _compile("exact")),
    "compile, int8": (_encoder, _compile("quantize{scheme=int8-dynamic}")),
    "compile and save": (_encoder, _save),
    "compile, onnxruntime": (_encoder, _compile("exact", backend="onnxruntime")),
    "compile, onnxruntime, and export_onnx": (_encoder, _export_onnx),
    "compile, fastest": (_encoder, _compile("exact", backend="fastest")),
    "compile, distill": (_encoder, _distill),
    "tune": (_encoder, _tune),
    "compile_generation": (decoder, _generation),
    "tune_generation": (decoder, _tune_generation),
    "optimize and export_gguf": (_gemma, _export_gguf),
}


def measure(name: str) -> PathCost:
    """Run one of `PATHS`, after a small model has been compiled."""
    warm_up(decoder=True)
    construct, path = PATHS[name]
    model = construct()
    reset_peak()
    before = used_memory("VmRSS")
    with tempfile.TemporaryDirectory(prefix="compile_paths-") as folder:
        # Held, so that the result is in memory to the end.
        result = path(model, Path(folder))
        peak = used_memory("VmHWM") - before
        del result
    return PathCost(name, weight_bytes(model), peak)


def table(costs: list[PathCost]) -> str:
    """The costs as Markdown, with the machine."""
    rows = [
        f"| {cost.path} | {cost.weight_bytes / 1e6:.0f} | {cost.peak / 1e6:.0f} | {cost.peak / cost.weight_bytes:.1f} |"
        for cost in costs
    ]
    head = "| path | model, MB | peak above the model, MB | / model |"
    return "\n".join([head, "|---|---:|---:|---:|", *rows, "", machine()]) + "\n"


def main() -> None:
    """Measure each path and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="all by default")
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--one", choices=PATHS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measure(options.one))))
        return
    costs: list[PathCost] = []
    for name in options.paths:
        costs.append(PathCost(**cast(dict[str, Any], run_apart(__file__, ["--one", name]))))
        print(f"{name}: {costs[-1].peak / costs[-1].weight_bytes:.2f}", file=sys.stderr)
    text = table(costs)
    print(text)
    if options.update:
        put_table("compile_paths", text)


if __name__ == "__main__":
    main()
