"""The time from a model in memory to its first output: Lissom, torch.compile and OpenVINO, for compile_time.py --peers."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, cast

import torch
from apart import run_apart
from compile_models import ENCODERS, Inputs, build, example_inputs
from memory import used_memory
from torch import nn

import lissom

First = Callable[[nn.Module, Inputs], object]
"""Compiles a model and computes its first output."""


@dataclass(frozen=True)
class PeerCost:
    """The cost of the first output of a model: seconds, and the peak in bytes above the process before it built the model."""

    model: str
    engine: str
    seconds: float
    peak: int


class _Positional(nn.Module):
    """A model with positional inputs and a single output, as tracing takes it."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True))).last_hidden_state


def _lissom(model: nn.Module, inputs: Inputs) -> object:
    return lissom.compile(model, inputs)(**inputs)


def _torch_compile(model: nn.Module, inputs: Inputs) -> object:
    torch.compiler.reset()
    with torch.inference_mode():
        return torch.compile(model)(**inputs)


def _openvino(model: nn.Module, inputs: Inputs) -> object:
    # If this package is importable, OpenVINO reports its import over the network.
    sys.modules.setdefault("openvino_telemetry", cast(ModuleType, None))
    runtime: Any = import_module("openvino")
    converted = runtime.convert_model(_Positional(model, list(inputs)), example_input=tuple(inputs.values()))
    threads = torch.get_num_threads()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = runtime.compile_model(converted, "CPU", options)
    return compiled([tensor.numpy() for tensor in inputs.values()])


_ENGINES: dict[str, First] = {"Lissom, exact": _lissom, "torch.compile": _torch_compile, "OpenVINO": _openvino}


def measure(name: str, engine: str) -> PeerCost:
    """Compile a model with an engine in this process, after a small one, so that imports are not counted."""
    first = _ENGINES[engine]
    first(build("BERT-tiny"), example_inputs("BERT-tiny"))
    inputs = example_inputs(name)
    before = used_memory("VmRSS")
    model = build(name)
    started = time.perf_counter()
    first(model, inputs)
    return PeerCost(name, engine, time.perf_counter() - started, used_memory("VmHWM") - before)


def costs_of_peers(names: Sequence[str]) -> tuple[list[PeerCost], list[str]]:
    """Measure the encoders among these models, each engine in a process of its own; also a sentence for each failure."""
    costs: list[PeerCost] = []
    missing = find_spec("openvino") is None
    failures = ["OpenVINO is not installed: `pip install openvino`."] if missing else []
    for name in (name for name in names if name in ENCODERS):
        for engine in _ENGINES:
            if engine == "OpenVINO" and missing:
                continue
            try:
                # Without compiled code of earlier runs.
                with tempfile.TemporaryDirectory() as cache:
                    cost = run_apart(__file__, [name, engine], environment={"TORCHINDUCTOR_CACHE_DIR": cache})
                costs.append(PeerCost(**cast(dict[str, Any], cost)))
            except RuntimeError as error:
                failures.append(f"{name}, {engine}: {error}")
    return costs, failures


def peer_table(costs: Sequence[PeerCost], failures: Sequence[str]) -> str:
    """The costs as Markdown, with what failed."""
    rows = [f"| {cost.model} | {cost.engine} | {cost.seconds:.1f} | {cost.peak / 1e6:.0f} |" for cost in costs]
    lines = ["| model | engine | to the first output, s | peak, MB |", "|---|---|---:|---:|", *rows]
    return "\n".join([*lines, *(f"\n{line}" for line in failures)]) + "\n"


def main() -> None:
    """Print the cost of one model with one engine as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=ENCODERS)
    parser.add_argument("engine", choices=_ENGINES)
    options = parser.parse_args()
    print(json.dumps(asdict(measure(options.model, options.engine))))


if __name__ == "__main__":
    main()
