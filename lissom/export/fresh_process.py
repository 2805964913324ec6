"""Calls what was written in a process that knows nothing of the one that wrote it, and compares what it computes there."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import UnsupportedError
from lissom.io.processes import python_environment


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


def outputs_of(program: Program, example: Sample) -> list[torch.Tensor]:
    """The outputs of a program, on the CPU."""
    with torch.no_grad():
        return [leaf.cpu() for leaf in program.run(example) if isinstance(leaf, torch.Tensor)]


def error_of(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """The largest relative error of outputs; infinite if they differ in number or shape."""
    if not wanted or [leaf.shape for leaf in outputs] != [leaf.shape for leaf in wanted]:
        return float("inf")
    return max(map(relative_error, wanted, outputs))
