"""Calls what was written in a process that knows nothing of the one that wrote it, and compares what it computes there."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import UnsupportedError
from lissom.frontends.capture.kv_cache import is_kv_cache_object, without_kv_cache
from lissom.io.processes import python_environment

if TYPE_CHECKING:
    from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def run_fresh(library: str, what: str, command: Sequence[str], request: str = "", folder: Path | None = None) -> None:
    """Run a command without network.

    Args:
        library: that loads it there, for the error.
        what: was written, for the error.
        request: the process's standard input.
        folder: its current directory.

    Raises:
        UnsupportedError: with the last line of the process's errors, if it fails.
    """
    ended = subprocess.run(
        command,
        input=request,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=python_environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"),
        cwd=folder,
    )
    if ended.returncode:
        last = next((line.strip() for line in reversed(ended.stderr.splitlines()) if line.strip()), "no message")
        raise UnsupportedError(f"{library} does not run {what} in a fresh process, so it is not written: {last:.300}")


def arguments_of(program: Program, model: nn.Module, example: Sample) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The arguments of a call by name: tensors, and others. Raises UnsupportedError for some that no file holds."""
    args, kwargs = program.signature.arguments([tensor.cpu() for tensor in example])
    given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    tensors = {name: value.contiguous() for name, value in given.items() if isinstance(value, torch.Tensor)}
    options = {name: value for name, value in given.items() if name not in tensors}
    odd = next((name for name, value in options.items() if not isinstance(value, _PLAIN)), None)
    if odd is not None:
        raise UnsupportedError(
            f"the argument '{odd}' is no tensor, number or text, so a fresh process cannot be given it; call "
            f"lissom.optimize with simpler example inputs"
        )
    return tensors, options


def named_outputs(model: Any, arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs of a model without a KV cache, by their numbers, on the CPU."""
    with torch.no_grad(), without_kv_cache(model):
        leaves = pytree.tree_leaves(model(**arguments), is_leaf=is_kv_cache_object)
    return {f"{index:04}": leaf.cpu().clone() for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}


def outputs_of(program: Program, example: Sample) -> list[torch.Tensor]:
    """The outputs of a program, on the CPU."""
    with torch.no_grad():
        return [leaf.cpu() for leaf in program.run(example) if isinstance(leaf, torch.Tensor)]


def error_of(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest relative error of outputs; infinite if they differ in number or shape."""
    if not wanted or [leaf.shape for leaf in outputs] != [leaf.shape for leaf in wanted]:
        return float("inf")
    return max(map(relative_error, wanted, outputs))
