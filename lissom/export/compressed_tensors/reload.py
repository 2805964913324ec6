"""Loads a written checkpoint by transformers and compressed-tensors in a fresh process, and calls it there.

The process runs this module: it reads a request from its standard input, calls the model, and writes the outputs and the hashes
of the weights, as the library decompresses them, to a file. Nothing of the process that wrote the checkpoint is in it.
"""

from __future__ import annotations

import hashlib
import json
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
    from torch import nn

_INPUTS, _OUTPUTS, _UNROUNDED = "inputs.safetensors", "outputs.safetensors", "unrounded.safetensors"
_HASHES = "hashes.json"


@dataclass(frozen=True)
class Request:
    """What the fresh process loads and calls.

    Attributes:
        directory: of the checkpoint.
        model: the name of a class of transformers.
        exchange: the directory of inputs and outputs.
        options: keyword arguments that are no tensors.
        layers: the paths of the layers whose weights are hashed.
        dequantize: transformers dequantizes when it loads, and not at the first call.
    """

    directory: str
    model: str
    exchange: str
    options: Mapping[str, object]
    layers: Sequence[str]
    dequantize: bool
    threads: int


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process computes with the checkpoint.

    Attributes:
        outputs: as the checkpoint says.
        unrounded: with the inputs of layers in floating point; the same where they are.
        hashes: of the dequantized weights, by the paths of their layers.
    """

    outputs: Sequence[torch.Tensor]
    unrounded: Sequence[torch.Tensor]
    hashes: Mapping[str, str]


def reload(
    program: Program, model: nn.Module, example: Sample, directory: Path, layers: Sequence[str], *, dequantize: bool
) -> Reloaded:
    """Load the checkpoint in a fresh process, and call it on the example.

    Args:
        model: that the program was captured from.
        layers: the paths of quantized layers.
        dequantize: as of a request.

    Raises:
        UnsupportedError: if the library does not load or run the checkpoint.
    """
    tensors, options = arguments_of(program, model, example)
    with tempfile.TemporaryDirectory(prefix="lissom-reload-") as exchange:
        save_file(tensors, Path(exchange) / _INPUTS)
        request = Request(str(directory), type(model).__name__, exchange, options, layers, dequantize, torch.get_num_threads())
        command = python_command("lissom.export.compressed_tensors.reload")
        run_fresh("transformers", f"the checkpoint of {program.name}", command, json.dumps(asdict(request)))
        outputs, unrounded = ([*load_file(Path(exchange) / name).values()] for name in (_OUTPUTS, _UNROUNDED))
        return Reloaded(outputs, unrounded, json.loads((Path(exchange) / _HASHES).read_text(encoding="utf-8")))


def hash_of(weight: torch.Tensor) -> str:
    """SHA-256 of the bytes of a tensor."""
    return hashlib.sha256(weight.detach().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _answer(request: Request) -> None:
    """Load the checkpoint, call it, and write its outputs and the hashes of its weights."""
    import transformers

    torch.set_num_threads(request.threads)
    kind: Any = getattr(transformers, request.model)
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if request.dequantize else {}
    model = kind.from_pretrained(request.directory, local_files_only=True, trust_remote_code=False, **how).eval()
    exchange = Path(request.exchange)
    arguments = {**load_file(exchange / _INPUTS), **request.options}
    save_file(named_outputs(model, arguments), exchange / _OUTPUTS)
    # The library decompresses weights at the first call.
    hashes = {layer: hash_of(model.get_submodule(layer).weight) for layer in request.layers}
    (exchange / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
    for layer in request.layers:
        model.get_submodule(layer).quantization_enabled = False
    save_file(named_outputs(model, arguments), exchange / _UNROUNDED)


if __name__ == "__main__":
    _answer(Request(**json.loads(sys.stdin.read())))
