"""Runs a model in transformers' own tensor parallelism on CPU ranks over gloo, in fresh processes, and reads their outputs.

The process runs this module: it reads a request from its standard input, calls the whole model, and starts the ranks. Each
loads its part of the checkpoint by the plan, calls the model, and writes its outputs and the size of its weights.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.export.fresh_process import arguments_of, named_outputs, run_fresh
from lissom.io.processes import python_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INPUTS, _CHECKPOINT, _STORE, _WHOLE = "inputs.safetensors", "checkpoint", "store", "whole"


@dataclass(frozen=True)
class Request:
    """What the ranks load and call.

    Attributes:
        folder: of the checkpoint, the inputs and the outputs.
        model: the name of a class of transformers.
        config: keyword arguments of `DistributedConfig`.
        options: keyword arguments of the call that are no tensors.
    """

    folder: str
    model: str
    config: Mapping[str, Any]
    options: Mapping[str, object]
    threads: int


@dataclass(frozen=True)
class Ran:
    """The outputs of a rank, or of the whole model.

    Attributes:
        parameter_bytes: of the parameters that it holds.
    """

    outputs: Sequence[torch.Tensor]
    parameter_bytes: int


def run_ranks(program: Program, model: PreTrainedModel, example: Sample, config: Mapping[str, Any]) -> tuple[Ran, list[Ran]]:
    """Call the model on the example, whole and on as many CPU ranks as the plan has.

    Args:
        model: that the program was captured from; its weights are copied to a temporary directory.
        config: keyword arguments of `DistributedConfig`, `tp_size` among them.

    Raises:
        UnsupportedError: if transformers does not load or run it.
    """
    tensors, options = arguments_of(program, model, example)
    with tempfile.TemporaryDirectory(prefix="lissom-ranks-") as folder:
        model.save_pretrained(Path(folder) / _CHECKPOINT)
        save_file(tensors, Path(folder) / _INPUTS)
        request = Request(folder, type(model).__name__, config, options, torch.get_num_threads())
        what = f"{program.name} on {config['tp_size']} ranks"
        run_fresh("transformers", what, python_command("lissom.export.tp_plan.ranks"), json.dumps(asdict(request)))
        ranks = [_read(Path(folder), str(rank)) for rank in range(config["tp_size"])]
        return _read(Path(folder), _WHOLE), ranks


def _read(folder: Path, who: str) -> Ran:
    outputs = list(load_file(folder / f"outputs-{who}.safetensors").values())
    return Ran(outputs, int((folder / f"bytes-{who}").read_text(encoding="utf-8")))


def _start(request: Request) -> None:
    """Call the whole model, then run all ranks; the error of the first one that fails is raised."""
    # transformers takes a CUDA device for each rank if it sees one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(request.threads)
    _call(request, _WHOLE)
    processes: Any = torch.multiprocessing
    processes.spawn(_answer, (request,), nprocs=request.config["tp_size"])


def _answer(rank: int, request: Request) -> None:
    """Call one rank's part of the model."""
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.set_num_threads(request.threads)
    store, size = f"file://{Path(request.folder) / _STORE}", request.config["tp_size"]
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        _call(request, str(rank), distributed_config=DistributedConfig(**request.config))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _call(request: Request, who: str, **how: object) -> None:
    """Load the model, call it, and write its outputs and its size."""
    import transformers
    from torch.distributed.tensor import DTensor

    folder, kind = Path(request.folder), getattr(transformers, request.model)
    model: Any = kind.from_pretrained(folder / _CHECKPOINT, local_files_only=True, **how).eval()
    save_file(named_outputs(model, {**load_file(folder / _INPUTS), **request.options}), folder / f"outputs-{who}.safetensors")
    held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    (folder / f"bytes-{who}").write_text(str(sum(part.nbytes for part in held)), encoding="utf-8")


if __name__ == "__main__":
    _start(Request(**json.loads(sys.stdin.read())))
