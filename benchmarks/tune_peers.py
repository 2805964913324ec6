"""Quantization by torchao, and by NNCF under a bound on accuracy, on all-MiniLM-L6-v2."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from lissom.cli.bench.engines import Call, Task, openvino, openvino_feed, torchao_int8
from lissom.cli.bench.workload import Inputs, load_model

Metric = Callable[[Callable[..., object]], float]


@dataclass(frozen=True)
class Peer:
    """What another library made.

    model: computes hidden states of any inputs. call: those of the example inputs, compiled for their shape.
    """

    model: Callable[..., object]
    call: Call


def torchao(task: Task, example: Inputs, _metric: Metric, _max_drop: float) -> Peer:
    """int8 everywhere: it takes no bound."""
    call = torchao_int8(task)(example)
    return Peer(task.model.source.model, call)


def nncf(task: Task, example: Inputs, metric: Metric, max_drop: float) -> Peer:
    """int8 where the bound allows it."""
    build = openvino(task, precision="f32", quantize=partial(_within_bound, metric=metric, max_drop=max_drop))
    return Peer(_model(lambda inputs: build(inputs)()), build(example))


PEERS = {"torchao int8 + torch.compile": torchao, "OpenVINO int8, NNCF with accuracy control": nncf}


def prepare(name: str, data: Sequence[Inputs], example: Inputs, metric: Metric, max_drop: float) -> Peer:
    """Quantize all-MiniLM-L6-v2, and compile it. data: batches that calibrate. metric, max_drop: the bound on the drop."""
    with tempfile.TemporaryDirectory() as folder:
        task = Task(load_model("minilm"), _rows(data), torch.get_num_threads(), Path(folder))
        return PEERS[name](task, example, metric, max_drop)


def _model(hidden: Callable[[Inputs], Any]) -> Callable[..., BaseModelOutput]:
    """A function with the model's call. hidden: gives the hidden states as an array."""
    return lambda **inputs: BaseModelOutput(last_hidden_state=torch.from_numpy(hidden(inputs)))


def _rows(data: Sequence[Inputs]) -> list[Inputs]:
    """Single texts without padding."""
    rows = [
        {name: tensor[at : at + 1] for name, tensor in batch.items()} for batch in data for at in range(len(batch["input_ids"]))
    ]
    return [{name: tensor[:, : int(row["attention_mask"].sum())] for name, tensor in row.items()} for row in rows]


def _within_bound(model: Any, calibration: Sequence[Inputs], *, metric: Metric, max_drop: float) -> Any:
    """int8 where the metric allows it: NNCF gives layers back to float32 until the drop is within the bound."""
    import nncf as library

    rows = [openvino_feed(model, inputs) for inputs in calibration]

    def score(compiled: Any, _: object) -> float:
        return metric(_model(lambda inputs: compiled(openvino_feed(compiled, inputs))[0]))

    return library.quantize_with_accuracy_control(
        model,
        library.Dataset(rows),
        library.Dataset(rows[:1]),  # the metric has texts of its own, and computes all of them for each item here
        score,
        max_drop=max_drop,
        model_type=library.ModelType.TRANSFORMER,
        subset_size=len(rows),
    )
