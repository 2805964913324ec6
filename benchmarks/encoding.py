"""`encode` of Sentence Transformers on texts of mixed length: PyTorch, ONNX Runtime, OpenVINO and Lissom.

    python benchmarks/encoding.py --update

Every backend encodes the same texts with all-MiniLM-L6-v2 in a process of its own, which also compares its embeddings with
PyTorch's. ONNX Runtime and OpenVINO run the transformer in the place where the backends of Sentence Transformers have it: those
need optimum, which cannot be installed beside transformers 5. Prints a Markdown table; `--update` puts it into
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from types import ModuleType
from typing import cast

import numpy as np
import torch
from apart import run_apart
from quality import read_texts
from readme import processor_kind, put_table
from sentence_transformers import SentenceTransformer
from torch import nn

import lissom
from lissom.frontends.models.huggingface import find_directory

Encoder = SentenceTransformer


class Exported(nn.Module):
    """A transformer that another runtime computes. run: from NumPy arrays by name to token embeddings."""

    def __init__(self, config: object, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
        super().__init__()
        self.config, self.run = config, run
        self.device = torch.device("cpu")

    def forward(self, **tensors: object) -> dict[str, torch.Tensor]:
        given = {name: value.numpy() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
        return {"last_hidden_state": torch.from_numpy(self.run(given))}


class TokenEmbeddings(nn.Module):
    """The transformer with positional inputs, for export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, types: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state


def export(encoder: Encoder, folder: Path) -> Path:
    """The transformer as ONNX with dynamic batch and sequence."""
    names = ["input_ids", "token_type_ids", "attention_mask"]
    example = encoder.preprocess(["a text", "another, longer text"])
    file = folder / "model.onnx"
    axes = {name: {0: "batch", 1: "sequence"} for name in (*names, "tokens")}
    options = {"input_names": names, "output_names": ["tokens"], "dynamic_axes": axes, "opset_version": 17, "dynamo": False}
    torch.onnx.export(TokenEmbeddings(encoder[0].model), tuple(example[name] for name in names), file, **options)
    return file


def onnxruntime(encoder: Encoder, folder: Path, *, int8: bool = False) -> Encoder:
    """The transformer in ONNX Runtime; int8: per-channel weights, dynamically quantized activations."""
    import onnxruntime as runtime

    file = export(encoder, folder)
    if int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(file, folder / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8)
        file = folder / "int8.onnx"
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    encoder[0].model = Exported(encoder[0].config, lambda given: session.run(None, given)[0])
    return encoder


def openvino(encoder: Encoder, folder: Path) -> Encoder:
    """The transformer in OpenVINO, in float32."""
    # If this package is importable, OpenVINO reports its import over the network.
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))
    import openvino as runtime

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = runtime.compile_model(export(encoder, folder), "CPU", {**options, "INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    encoder[0].model = Exported(encoder[0].config, lambda given: request.infer(given)[0].copy())
    return encoder


def compiled(encoder: Encoder, folder: Path, *, passes: str = "exact") -> Encoder:
    """All modules compiled by Lissom."""
    return lissom.compile(encoder, passes=passes, goal=None)


BACKENDS: dict[str, tuple[str, Callable[[Encoder, Path], Encoder]]] = {
    "torch": ("PyTorch", lambda encoder, folder: encoder),
    "onnxruntime": ("ONNX Runtime", onnxruntime),
    "openvino": ("OpenVINO", openvino),
    "lissom": ("Lissom", compiled),
    "onnxruntime-int8": ("ONNX Runtime, int8", partial(onnxruntime, int8=True)),
    "lissom-bf16": ("Lissom, bf16", partial(compiled, passes="cast{dtype=bf16}")),
    "lissom-int8": ("Lissom, int8", partial(compiled, passes="quantize")),
}


@dataclass(frozen=True)
class Row:
    """The times of a backend, in seconds, and the least cosine between its embeddings and PyTorch's."""

    backend: str
    seconds: list[float]
    cosine: float


def mixed_texts(count: int) -> list[str]:
    """Texts of 1 to 8 WordNet texts each, the same ones every time."""
    draw = random.Random(0)
    lines = [text for part in read_texts() for text in part]
    draw.shuffle(lines)
    feed = iter(lines)
    return ["; ".join(next(feed) for _ in range(draw.randint(1, 8))) for _ in range(count)]


def measure(name: str, count: int, rounds: int, threads: int) -> Row:
    """The times of one backend in this process."""
    torch.set_num_threads(threads)
    texts = mixed_texts(count)
    encoder = SentenceTransformer(str(find_directory("minilm")), device="cpu")
    wanted = encoder.encode(texts[:64])
    with tempfile.TemporaryDirectory() as folder:
        encoder = BACKENDS[name][1](encoder, Path(folder))
        embeddings = encoder.encode(texts[:64])
        cosine = (wanted * embeddings).sum(1) / np.linalg.norm(wanted, axis=1) / np.linalg.norm(embeddings, axis=1)
        seconds: list[float] = []
        for _ in range(rounds):
            started = time.perf_counter()
            encoder.encode(texts)
            seconds.append(time.perf_counter() - started)
    return Row(name, seconds, float(cosine.min()))


def table(rows: list[Row], count: int) -> str:
    """The rows as Markdown."""
    lines = ["| backend | seconds | texts a second | speedup | least cosine |", "|---|---|---:|---:|---:|"]
    first = median(rows[0].seconds)
    for row in rows:
        middle = median(row.seconds)
        low, _, high = quantiles(row.seconds, n=4) if len(row.seconds) > 1 else (middle,) * 3
        lines.append(
            f"| {BACKENDS[row.backend][0]} | {middle:.2f} ({low:.2f} to {high:.2f}) | {count / middle:.0f} "
            f"| {first / middle:.2f} | {row.cosine:.5f} |"
        )
    names = ("torch", "transformers", "sentence-transformers", "onnxruntime", "openvino", "lissom")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    rounds, threads = len(rows[0].seconds), torch.get_num_threads()
    where = f"{count} texts, medians of {rounds} rounds (middle half). {processor_kind()}, {threads} threads"
    return "\n".join([*lines, "", f"{where}; Python {platform.python_version()}, {versions}.", ""])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backends", default=",".join(BACKENDS), help="some of %(default)s; the first is the basis")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--update", action="store_true", help="put the table into benchmarks/README.md")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        print(json.dumps(vars(measure(options.worker, options.texts, options.rounds, options.threads))))
        return
    arguments = [f"--texts={options.texts}", f"--rounds={options.rounds}", f"--threads={options.threads}"]
    results = [run_apart(__file__, [f"--worker={name}", *arguments]) for name in options.backends.split(",")]
    printed = table([Row(**cast(dict, row)) for row in results], options.texts)
    print(printed)
    if options.update:
        put_table("encoding", printed, by_processor=True)


if __name__ == "__main__":
    main()
