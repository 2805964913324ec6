"""ONNX Runtime: the program exported to ONNX, opened by an inference session, and checked against the program.

The file is standard ONNX, with operators of `com.microsoft` where they were measured faster, and runs without Lissom.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import fx

from lissom.backends.base import Backend, Executable, confirm
from lissom.compiler import node as nodes
from lissom.compiler.errors import ArtifactError, UnsupportedError
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample
from lissom.inspect.timing import time_calls

if TYPE_CHECKING:
    import onnx_ir as ir

    from lissom.backends.onnx_session import Session

_SECONDS = 0.3
"""How long each form of a model is timed."""
_GAIN = 0.98
"""A fusion must take less than this share of the time without, so that noise does not decide."""


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """Runs the program with ONNX Runtime; needs the packages of the extra `onnx` or `onnx-gpu`.

    providers: execution providers, the first that can run a node runs it; by default CUDA for a program on CUDA, then the CPU.
    provider_options: for each provider its options, passed on as they are.
    threads: for one operator; by default as many as PyTorch uses.
    arena: keep memory between calls.
    optimization: how much ONNX Runtime rewrites the graph when it opens it.
    """

    name: ClassVar[str] = "onnxruntime"

    providers: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    threads: int | None = None
    arena: bool = True
    optimization: Literal["none", "basic", "extended", "all"] = "all"

    def missing(self) -> str | None:
        absent = [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        return (
            f"backend 'onnxruntime' needs {' and '.join(absent)}; "
            f"pip install 'lissom[onnx]', or 'lissom[onnx-gpu]' for CUDA, or choose backend 'eager'"
        )

    def build(self, program: Program, example: Sample) -> Executable:
        """What runs the program: a `Session`.

        Raises: UnsupportedError when the program keeps state, returns sizes, or holds what ONNX or its runtime cannot do;
            VerifyError when the session gives something else than the program.
        """
        _check(program)
        try:
            session = self._build(program, example)
        except UnsupportedError:
            raise
        # Neither the exporter's errors nor the runtime's have a common class.
        except Exception as error:
            raise UnsupportedError(
                f"ONNX Runtime cannot run {program.name}: {_reason(error)}; choose backend 'eager'"
            ) from error
        confirm(self.name, session, program, example)
        return session

    def _build(self, program: Program, example: Sample) -> Session:
        """The session of the model in its fastest form; what was tried stands in its notes."""
        # Here, because they are an extra and take a second or two to import.
        from lissom.backends.onnx_export import export_onnx
        from lissom.backends.onnx_forms import CHOICES, write_form

        exported = export_onnx(program, example)
        best, chosen, notes = self._open(program, write_form(exported)[0]), list[str](), list[str]()
        for choice, words in CHOICES.items():
            model, places = write_form(exported, [*chosen, choice])
            if not places[choice]:
                continue
            other = self._open(program, model)
            timings = time_calls({"with": partial(other, example), "without": partial(best, example)}, _SECONDS)
            faster = timings["with"].median_ms < _GAIN * timings["without"].median_ms
            notes.append(
                f"{words}, {places[choice]} times, {'is used' if faster else 'is not used'}: "
                f"{timings['with']} ms with it, {timings['without']} ms without"
            )
            if faster:
                best, chosen = other, [*chosen, choice]
        best.notes += tuple(notes)
        return best

    def _open(self, program: Program, model: ir.Model) -> Session:
        from lissom.backends.onnx_export import save_onnx

        folder = Path(mkdtemp(prefix="lissom-"))
        try:
            return self._session(program, save_onnx(model, folder), keep=False)
        except BaseException:
            shutil.rmtree(folder)
            raise

    def _session(self, program: Program, path: Path, keep: bool) -> Session:
        from lissom.backends.onnx_session import Session, choose_providers, fallen_back, open_session, placed_nodes

        providers = choose_providers(program, self.providers, self.provider_options)
        threads = self.threads or torch.get_num_threads()
        session = open_session(path, providers, threads=threads, arena=self.arena, optimization=self.optimization)
        first = providers[0][0]
        warning = fallen_back(placed_nodes(session), first) if first != "CPUExecutionProvider" else None
        return Session(program, path, session, [warning] if warning else [], keep)

    def save_files(self, executable: Executable, folder: Path) -> None:
        """The ONNX file, which any ONNX Runtime opens, and its weights."""
        from lissom.backends.onnx_session import Session

        assert isinstance(executable, Session)
        for file in executable.path.parent.iterdir():
            shutil.copyfile(file, folder / file.name)

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """The ONNX file opened, its weights mapped."""
        missing = self.missing()
        if missing is not None:
            raise UnsupportedError(missing)
        from lissom.backends.onnx_export import MODEL

        try:
            return self._session(program, folder / MODEL, keep=True)
        except UnsupportedError:
            raise
        # ONNX Runtime's errors have no common class.
        except Exception as error:
            raise ArtifactError(f"'{folder / MODEL}' does not open: {_reason(error)}; compile the model again") from error


def _check(program: Program) -> None:
    """Refuse what cannot be exported, or what ONNX Runtime has no kernels for. Raises: UnsupportedError."""
    if program.state:
        raise UnsupportedError(
            f"backend 'onnxruntime' keeps no state, and {program.name} writes to '{program.state[0]}'; choose backend 'eager'"
        )
    for leaf in program.output.args[0]:  # pyright: ignore
        if isinstance(leaf, fx.Node) and not nodes.is_tensor(leaf):
            raise UnsupportedError(
                f"backend 'onnxruntime' returns tensors, and {program.name} returns the size '{leaf.name}'; "
                f"choose backend 'eager'"
            )
    for node in program:
        if nodes.is_tensor(node) and node.op != "output":
            found = nodes.tensor_type(node)
            if found.dtype == torch.bfloat16 and found.device.type == "cpu":
                raise UnsupportedError(
                    f"ONNX Runtime lacks kernels of bfloat16 on a CPU, and {program.name} has it in '{node.name}'; "
                    f"leave the cast out, or choose backend 'eager'"
                )


def _reason(error: BaseException) -> str:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first}"
