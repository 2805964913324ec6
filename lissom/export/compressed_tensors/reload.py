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

_INPUTS, _OUTPUTS, _UNROUNDED, _CACHED = (f"{name}.safetensors" for name in ("inputs", "outputs", "unrounded", "cached"))
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
        attentions: the paths of those whose keys and values are quantized.
        dequantize: transformers dequantizes when it loads, and not at the first call.
    """

    directory: str
    model: str
    exchange: str
    options: Mapping[str, object]
    layers: Sequence[str]
    attentions: Sequence[str]
    dequantize: bool
    threads: int


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process computes with the checkpoint.

    Attributes:
        outputs: with the inputs of layers as the checkpoint says, and keys and values in floating point.
        unrounded: with the inputs in floating point too; the same where they are.
        cached: with the inputs in floating point, and keys and values as the checkpoint says; None if the library has no scheme
            of keys and values for the model.
        hashes: of the dequantized weights, by the paths of their layers.
    """

    outputs: Sequence[torch.Tensor]
    unrounded: Sequence[torch.Tensor]
    cached: Sequence[torch.Tensor] | None
    hashes: Mapping[str, str]


def reload(
    program: Program,
    model: nn.Module,
    example: Sample,
    directory: Path,
    layers: Sequence[str],
    attentions: Sequence[str] = (),
    *,
    dequantize: bool,
) -> Reloaded:
    """Load the checkpoint in a fresh process, and call it on the example.

    Args:
        model: that the program was captured from.
        layers: the paths of quantized layers.
        attentions: as of a request, like dequantize.

    Raises:
        UnsupportedError: if the library does not load or run the checkpoint.
    """
    tensors, options = arguments_of(program, model, example)
    with tempfile.TemporaryDirectory(prefix="lissom-reload-") as exchange:
        save_file(tensors, Path(exchange) / _INPUTS)
        threads, kind = torch.get_num_threads(), type(model).__name__
        request = Request(str(directory), kind, exchange, options, layers, attentions, dequantize, threads)
        command = python_command("lissom.export.compressed_tensors.reload")
        run_fresh("transformers", f"the checkpoint of {program.name}", command, json.dumps(asdict(request)))
        files = [Path(exchange) / name for name in (_OUTPUTS, _UNROUNDED, _CACHED)]
        outputs, unrounded, cached = ([*load_file(file).values()] if file.exists() else None for file in files)
        assert outputs is not None and unrounded is not None
        return Reloaded(outputs, unrounded, cached, json.loads((Path(exchange) / _HASHES).read_text(encoding="utf-8")))


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
    _switch(model, request.attentions, on=False)
    save_file(named_outputs(model, arguments), exchange / _OUTPUTS)
    # The library decompresses weights at the first call.
    hashes = {layer: hash_of(model.get_submodule(layer).weight) for layer in request.layers}
    (exchange / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
    _switch(model, request.layers, on=False)
    save_file(named_outputs(model, arguments), exchange / _UNROUNDED)
    _switch(model, request.attentions, on=True)
    if request.attentions and all(hasattr(model.get_submodule(path), "quantization_scheme") for path in request.attentions):
        save_file(named_outputs(model, arguments), exchange / _CACHED)


def _switch(model: Any, paths: Sequence[str], *, on: bool) -> None:
    """Let the library quantize what these modules are given, or not."""
    for path in paths:
        model.get_submodule(path).quantization_enabled = on


if __name__ == "__main__":
    _answer(Request(**json.loads(sys.stdin.read())))
