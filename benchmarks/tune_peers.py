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

from lissom.bench.engines import Call, Task, openvino, torchao_int8
from lissom.bench.workload import Inputs, load_model

PEERS = ("torchao int8 + torch.compile", "OpenVINO int8, NNCF with accuracy control")

Metric = Callable[[Callable[..., object]], float]


@dataclass(frozen=True)
class Peer:
    """What another library made.

    model: computes hidden states of any inputs. call: those of the example inputs, compiled for their shape.
    """

    model: Callable[..., object]
    call: Call

    @staticmethod
    def prepare(name: str, data: Sequence[Inputs], example: Inputs, metric: Metric, max_drop: float) -> Peer:
        """Quantize and compile. data: batches that calibrate. metric, max_drop: the bound, where the library takes one."""
        with tempfile.TemporaryDirectory() as folder:
            task = Task(load_model("minilm"), _rows(data), torch.get_num_threads(), Path(folder))
            if name == PEERS[0]:
                call = torchao_int8(task)(example)
                return Peer(task.model.source.model, call)
            build = openvino(task, precision="f32", quantize=partial(_within_bound, metric=metric, max_drop=max_drop))

            def model(**inputs: torch.Tensor) -> BaseModelOutput:
                return BaseModelOutput(last_hidden_state=torch.from_numpy(build(inputs)()))

            return Peer(model, build(example))


def _rows(data: Sequence[Inputs]) -> list[Inputs]:
    """Single texts without padding."""
    rows = [
        {name: tensor[at : at + 1] for name, tensor in batch.items()} for batch in data for at in range(len(batch["input_ids"]))
    ]
    return [{name: tensor[:, : int(row["attention_mask"].sum())] for name, tensor in row.items()} for row in rows]


def _within_bound(model: Any, calibration: Sequence[Inputs], *, metric: Metric, max_drop: float) -> Any:
    """int8 where the metric allows it: NNCF gives layers back to float32 until the drop is within the bound."""
    import nncf

    rows = [{name: tensor.numpy() for name, tensor in row.items()} for row in calibration]
    names = [port.get_any_name() for port in model.inputs]

    def score(compiled: Any, _: object) -> float:
        def call(**inputs: torch.Tensor) -> BaseModelOutput:
            hidden = compiled({name: inputs[name].numpy() for name in names})[0]
            return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))

        return metric(call)

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(rows),
        nncf.Dataset(rows[:1]),  # the metric has texts of its own, and computes all of them for each item here
        score,
        max_drop=max_drop,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(rows),
    )
