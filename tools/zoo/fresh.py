"""Fresh processes that never imported a model: each loads one artifact and runs it.

They are forked from a process that has imported Lissom and ONNX Runtime but no model, so they start at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Client, Listener
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

import lissom
from lissom.compiler.ir.samples import Sample

_INPUTS, _ANSWERS = "inputs.pt", "answers.pt"
_PATIENCE = 120.0


@contextmanager
def loader() -> Generator[str]:
    """Context manager that gives the address of a loader for artifacts."""
    with tempfile.TemporaryDirectory(prefix="lissom-") as folder:
        address = f"{folder}/socket"
        process = subprocess.Popen([sys.executable, "-m", "tools.zoo.fresh", address])
        try:
            deadline = time.monotonic() + _PATIENCE
            while not Path(address).exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the process that loads artifacts did not start")
                time.sleep(0.05)
            yield address
        finally:
            process.terminate()
            process.wait()


def answers(address: str, artifact: Path, samples: Sequence[Sample]) -> list[tuple[str, list[object]]]:
    """The outputs of an artifact for flat inputs, computed in a fresh process: the outline of each result, and its leaves.

    Raises: RuntimeError with the error of that process.
    """
    torch.save([list(sample) for sample in samples], artifact.parent / _INPUTS)
    with Client(address, "AF_UNIX") as connection:
        connection.send(str(artifact))
        try:
            problem = connection.recv()
        except EOFError:
            problem = "the process died"
    if problem:
        raise RuntimeError(problem)
    return torch.load(artifact.parent / _ANSWERS)


def outline(output: object) -> str:
    """The structure of a result: its containers, by type and keys, and the positions of tensors in them."""
    if isinstance(output, torch.Tensor):
        return "tensor"
    if isinstance(output, Mapping):
        inside = ", ".join(f"{key}: {outline(value)}" for key, value in output.items())
        return f"{type(output).__name__}({inside})"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__}({', '.join(map(outline, output))})"
    if not pytree.tree_structure(output).is_leaf():
        inside = ", ".join("tensor" if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in pytree.tree_leaves(output))
        return f"{type(output).__name__}({inside})"
    return repr(output)


def _answer(artifact: Path) -> None:
    model = lissom.load(artifact)
    answers: list[tuple[str, list[object]]] = []
    for sample in torch.load(artifact.parent / _INPUTS):
        args, kwargs = model.program.signature.arguments(sample)
        result = model(*args, **kwargs)
        leaves = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(result)]
        answers.append((outline(result), leaves))
    torch.save(answers, artifact.parent / _ANSWERS)


def _serve(address: str) -> None:
    import lissom.backends.onnxruntime.session  # noqa: F401

    torch.set_num_threads(1)
    parent = os.getppid()
    with Listener(address, "AF_UNIX", backlog=16) as listener:
        while os.getppid() == parent:
            with listener.accept() as connection:
                if os.fork() == 0:
                    artifact = Path(connection.recv())
                    try:
                        _answer(artifact)
                        connection.send("")
                    except Exception as error:
                        connection.send(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
                    os._exit(0)
            _reap()


def _reap() -> None:
    """Collect the child processes that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    _serve(sys.argv[1])
