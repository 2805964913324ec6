"""ONNX Runtime: the program exported to ONNX, opened by an inference session, and checked against the program.

The file is standard ONNX, with operators of `com.microsoft` where they were measured faster, and runs without Lissom.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from tempfile import mkdtemp
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lissom.backends.base import Backend, Executable, confirm
from lissom.backends.compiled import check_plain, kind_and_reason
from lissom.compiler import node as nodes
from lissom.compiler.errors import ArtifactError, InputError, UnsupportedError, VerifyError
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample, resize
from lissom.inspect.timing import time_calls

if TYPE_CHECKING:
    import onnx_ir as ir

    from lissom.backends.onnx_session import Session

CUTTING = "batches.json"
"""The file of an artifact that says in which pieces batches are computed."""
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
    timing_seconds: how long each form the model can be written in is timed, at each of two sizes.
    """

    name: ClassVar[str] = "onnxruntime"

    providers: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    threads: int | None = None
    arena: bool = True
    optimization: Literal["none", "basic", "extended", "all"] = "all"
    timing_seconds: float = 0.3

    def missing(self) -> str | None:
        absent = [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        return (
            f"backend 'onnxruntime' needs {' and '.join(absent)}; "
            f"pip install 'lissom[onnx]', or 'lissom[onnx-gpu]' for CUDA, or choose backend 'eager'"
        )

    def build(self, program: Program, example: Sample) -> Executable:
        """What runs the program: a `Session` of the model in its fastest form; its notes tell what was tried.

        Raises: UnsupportedError when the program keeps state, returns sizes, or holds what ONNX or its runtime cannot do;
            VerifyError when the session gives something else than the program.
        """
        _check(program)
        # Here, because they are an extra and take a second or two to import.
        from lissom.backends.batches import fastest_cutting
        from lissom.backends.onnx_forms import CHOICES, write_form

        try:
            exported, best = self._export(program, example, decompose=False)
        # What the exporter cannot translate, or translates wrongly, it may know when it is taken apart.
        except (UnsupportedError, VerifyError):
            exported, best = self._export(program, example, decompose=True)
        chosen, notes = list[str](), list[str]()
        for choice, words in CHOICES.items():
            model, places = write_form(exported, [*chosen, choice])
            if not places[choice]:
                continue
            try:
                other = self._open(program, model)
                confirm(self.name, other, program, example)
            # Some versions and providers lack an operator, or have one that is wrong.
            except Exception as error:
                notes.append(f"{words}, {places[choice]} times, is not used: {_reason(error)}")
                continue
            faster, times = _compare(other, best, _timed_samples(program, example), self.timing_seconds)
            notes.append(f"{words}, {places[choice]} times, {'is used' if faster else 'is not used'}: {times}")
            if faster:
                best, chosen = other, [*chosen, choice]
        cutting = fastest_cutting(best.run, program, example, self.timing_seconds) if self.timing_seconds else None
        if cutting is not None:
            best.cutting = cutting[0]
            notes.append(f"large batches are computed in pieces: {cutting[1]}")
        best.notes += tuple(notes)
        return best

    def _export(self, program: Program, example: Sample, decompose: bool) -> tuple[ir.Model, Session]:
        """The exported model, and its plain form opened and confirmed. Raises: UnsupportedError, VerifyError."""
        from lissom.backends.onnx_export import export_onnx
        from lissom.backends.onnx_forms import write_form

        try:
            exported = export_onnx(program, example, decompose)
            session = self._open(program, write_form(exported)[0])
        except UnsupportedError:
            raise
        # Neither the exporter's errors nor the runtime's have a common class.
        except Exception as error:
            raise UnsupportedError(
                f"ONNX Runtime cannot run {program.name}: {_reason(error)}; choose backend 'eager'"
            ) from error
        confirm(self.name, session, program, example)
        return exported, session

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
        elements = executable.cutting.elements if executable.cutting is not None else None
        (folder / CUTTING).write_text(json.dumps({"elements": elements}), encoding="utf-8")

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """The ONNX file opened, its weights mapped."""
        missing = self.missing()
        if missing is not None:
            raise UnsupportedError(missing)
        from lissom.backends.batches import Cutting, batch_inputs
        from lissom.backends.onnx_export import MODEL

        try:
            session = self._session(program, folder / MODEL, keep=True)
            elements = json.loads((folder / CUTTING).read_text(encoding="utf-8"))["elements"]
            session.cutting = Cutting(batch_inputs(program), int(elements)) if elements else None
            return session
        except UnsupportedError:
            raise
        # ONNX Runtime's errors have no common class.
        except Exception as error:
            raise ArtifactError(f"'{folder / MODEL}' does not open: {_reason(error)}; compile the model again") from error


def _check(program: Program) -> None:
    """Refuse what cannot be exported, or what ONNX Runtime has no kernels for. Raises: UnsupportedError."""
    check_plain(OnnxRuntime.name, program)
    for node in program:
        if nodes.is_tensor(node) and node.op != "output":
            found = nodes.tensor_type(node)
            if found.dtype == torch.bfloat16 and found.device.type == "cpu":
                raise UnsupportedError(
                    f"ONNX Runtime lacks kernels of bfloat16 on a CPU, and {program.name} has it in '{node.name}'; "
                    f"leave the cast out, or choose backend 'eager'"
                )


def _timed_samples(program: Program, example: Sample) -> list[Sample]:
    """The example, and the same with every size that varies four times as large, where the program takes that."""
    signature = program.signature
    sizes = {
        symbol: min(4 * size, signature.dimensions[symbol].maximum or 4 * size)
        for symbol, size in signature.sizes_of(example).items()
    }
    larger = resize(signature, example, sizes)
    try:
        signature.check_sizes(larger)
        with torch.no_grad():
            program.run(larger)
    # Too large, or drawn so that the model refuses it.
    except (InputError, RuntimeError, ValueError, IndexError):
        return [example]
    return [example, larger] if sizes else [example]


def _compare(other: Session, best: Session, samples: Sequence[Sample], seconds: float) -> tuple[bool, str]:
    """Whether the other session is faster over all, and the times in words.

    Of the runs the faster quarter is looked at, which other work on the machine disturbs least.
    """
    ratios: list[float] = []
    told: list[str] = []
    for sample in samples:
        timings = time_calls({"with": partial(other, sample), "without": partial(best, sample)}, seconds)
        ratios.append(timings["with"].low_ms / timings["without"].low_ms)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in sample)
        told.append(f"{timings['with']} ms with it and {timings['without']} ms without on inputs {shapes}")
    return geometric_mean(ratios) < _GAIN, "; ".join(told)


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return kind_and_reason(error)
