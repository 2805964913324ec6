"""The time of every operator of a session, from ONNX Runtime's own profile of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lissom.backends.onnxruntime.session import Session, SessionOptions, open_session
from lissom.compiler.analysis.cost import costs_on
from lissom.compiler.ir.program import Program
from lissom.inspect.hot_layers import LayerTime, LayerTimes
from lissom.inspect.kernels import Kernel, without_numbers
from lissom.inspect.roofline import sizes_text
from lissom.measure.timing import time_runs

_FEWEST_RUNS = 5
_WARM_UPS = 2
_SUFFIX = "_kernel_time"
_FUSED = "fused operators"
_NOTE = "ONNX Runtime fuses operators, and chooses their kernels; their cost is not known, so no roofline is shown."
_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
_DTYPES = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class _Event:
    """One run of an operator.

    Attributes:
        index: of the operator in the graph.
    """

    index: str
    layer: tuple[str, str, Kernel]
    milliseconds: float


def profiled_layers(
    program: Program, session: Session, options: SessionOptions, sample: Sequence[torch.Tensor], seconds: float
) -> LayerTimes:
    """Equal operators of the session's model added up, the slowest first: medians of all runs within `seconds`.

    A second session of the model runs them; the first one's state is left as it is.
    """
    with TemporaryDirectory(prefix="lissom-") as folder:
        opened = open_session(session.path, options, profile=Path(folder) / "profile")
        profiled = Session(program, session.path, opened, keep=True)
        profiled.cutting = session.cutting
        timed = time_runs({"call": partial(profiled, sample)}, seconds, least=_FEWEST_RUNS, warm_ups=_WARM_UPS)
        events = json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8"))
    operators = [_event(event) for event in events if event["cat"] == "Node" and event["name"].endswith(_SUFFIX)]
    layers = _added_up(operators, _WARM_UPS + len(timed["call"]))
    return LayerTimes(f"{program.name} on onnxruntime, {sizes_text(costs_on(program, sample)[0])}", layers, _NOTE)


def _added_up(operators: Sequence[_Event], runs: int) -> tuple[LayerTime, ...]:
    by_operator: dict[tuple[str, tuple[str, str, Kernel]], list[float]] = {}
    for operator in operators:
        by_operator.setdefault((operator.index, operator.layer), []).append(operator.milliseconds)
    layers: dict[tuple[str, str, Kernel], list[float]] = {}
    for (_, layer), milliseconds in by_operator.items():
        calls = len(milliseconds) / runs  # microbatches run an operator several times a call
        layers.setdefault(layer, []).append(calls * statistics.median(milliseconds[round(_WARM_UPS * calls) :]))
    layer_times = (LayerTime(*layer, len(times), sum(times), None) for layer, times in layers.items())
    return tuple(sorted(layer_times, key=lambda layer: -layer.milliseconds))


def _event(event: Mapping[str, Any]) -> _Event:
    arguments = event["args"]
    module, slash, _ = str(event["name"]).removesuffix(_SUFFIX).removeprefix("fused ").rpartition("/")
    inputs, outputs = ([_typed(given) for given in arguments[f"{side}_type_shape"]] for side in ("input", "output"))
    dtype, sizes = outputs[0] if outputs else ("", [])
    name = arguments["op_name"]
    product = name in _PRODUCTS and len(inputs) > 0 and len(inputs[0][1]) > 1
    shape = _product(inputs[0][1], sizes) if product else " × ".join(map(str, sizes))
    kernel = Kernel("ONNX Runtime", name, _DTYPES.get(dtype, dtype))
    return _Event(arguments["node_index"], (without_numbers(module) if slash else _FUSED, shape, kernel), event["dur"] / 1e3)


def _typed(given: Mapping[str, list[int]]) -> tuple[str, list[int]]:
    """The dtype and the sizes of a tensor, `{"float": [2, 5, 16]}`."""
    return next(iter(given.items()), ("", []))


def _product(x: Sequence[int], output: Sequence[int]) -> str:
    return f"{math.prod(x[:-1])} × {x[-1]} → {output[-1]}"
