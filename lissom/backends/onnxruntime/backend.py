"""ONNX Runtime: the program exported to ONNX, opened by an inference session, and checked against the program.

The file is standard ONNX, with operators of `com.microsoft` where they were measured faster, and runs without Lissom.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from lissom.backends.base import Backend, Executable, confirm, restored_state, smallest_samples
from lissom.backends.exported import check_tensors, kind_and_reason
from lissom.backends.onnxruntime.session_options import unlisted_option
from lissom.backends.simulated_layers import SimulatedLayer, account
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, resize
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.verify.rounding import LOCAL_TOLERANCE
from lissom.errors import ArtifactError, InputError, LissomError, UnsupportedError, VerifyError
from lissom.inspect.timing import ENOUGH, time_calls
from lissom.ops import block_sparse_attention
from lissom.passes.lowering.lower_sparse_attention import LowerSparseAttention
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

    from lissom.backends.onnx.integer_matmul import Layer
    from lissom.backends.onnxruntime.session import Session, SessionOptions

CUTTING = "batches.json"
"""The file of an artifact that says in which pieces batches are computed."""
_GAIN = 0.98
"""A fusion must take less than this share of the time without, so that noise does not decide."""
_ROUNDED, _ROUNDED_LOCALLY = 0.5, 0.03
"""What rounding values to eight bits, by 4e-3 of the largest of a group, may come to over tens of layers, and in one."""


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """Runs the program with ONNX Runtime; needs the packages of the extra `onnx` or `onnx-gpu`.

    providers: execution providers, the first that can run a node runs it; by default CUDA for a program on CUDA, then the CPU.
    provider_options: for each provider its options, passed on as they are.
    threads: for one operator; by default as many as PyTorch uses.
    arena: keep memory between calls.
    optimization: how much ONNX Runtime rewrites the graph when it opens it.
    timing_seconds: how long each form the model can be written in is timed, at each of two sizes.
    accuracy_level: how layers with weights of few bits and values in floating point are multiplied: 0 as they say; 4 with the
        values rounded to eight bits too, for each group of neighbours, which is faster, and the report gives the error.
    """

    name: ClassVar[str] = "onnxruntime"

    providers: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    threads: int | None = None
    arena: bool = True
    optimization: Literal["none", "basic", "extended", "all"] = "all"
    timing_seconds: float = 0.3
    accuracy_level: Literal[0, 4] = 0

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        # Whether a sparse form is the faster one is found with ONNX Runtime itself, once the model is there.
        return (FoldQuantizedWeights(), LowerSparseAttention(always=True, causal=False))

    def simulated(self, program: Program) -> Sequence[SimulatedLayer]:
        """None: it is seen from the session that is built, which says so."""
        return ()

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

        Raises: UnsupportedError when the program returns sizes, or holds what ONNX or its runtime cannot do;
            VerifyError when the session gives something else than the program.
        """
        _check(program)
        # Here, because they are an extra and take a second or two to import.
        from lissom.backends.microbatches import fastest_cutting
        from lissom.backends.onnx.translation import check_translatable
        from lissom.backends.onnx.variants import CHOICES

        check_translatable(program)
        try:
            start = self._start(program, example, decompose=False)
        # What the exporter cannot translate, or translates wrongly, it may know when it is taken apart.
        except (UnsupportedError, VerifyError):
            start = self._start(program, example, decompose=True)
        best, chosen, notes = start.session, [start.form] if start.form else [], start.notes
        samples, least = _timed_samples(program, example), 5
        if program.nodes(block_sparse_attention) and 0 < self.timing_seconds < _seconds(best, example):
            # What takes so long is told from few runs, and four times the length is not needed.
            samples, least = [example], 2
        for choice, words in CHOICES.items():
            model, places = self._write(program, start.exported, [*chosen, choice])
            if not places[choice]:
                continue
            try:
                other = self._open(program, model)
                confirm(self.name, other, program, example, start.allowed)
            # Some versions and providers lack an operator, or have one that is wrong.
            except Exception as error:
                notes.append(f"{words}, {places[choice]} times, is not used: {_reason(error)}")
                continue
            faster, times = _compare(other, best, samples, self.timing_seconds, least)
            notes.append(f"{words}, {places[choice]} times, {'is used' if faster else 'is not used'}: {times}")
            if faster:
                best, chosen = other, [*chosen, choice]
        best = self._by_pairs(program, example, start, best, chosen, notes)
        cuts = self.timing_seconds and not program.state
        cutting = fastest_cutting(best.run, program, example, self.timing_seconds) if cuts else None
        if cutting is not None:
            best.cutting = cutting[0]
            notes.append(f"large batches are computed in pieces: {cutting[1]}")
        if start.layers:
            best.quantized, best.simulated = len(start.layers), start.left
            notes.insert(0, account(start.left, len(start.layers), self._products(program, best)))
        best.notes += tuple(notes)
        return best

    def _by_pairs(
        self, program: Program, example: Sample, start: _Start, best: Session, chosen: Sequence[str], notes: list[str]
    ) -> Session:
        """The faster of a session and one whose block-sparse attention has a mask of all pairs; what was found is noted."""
        from lissom.backends.onnx.sparse_attention import ungathered
        from lissom.backends.onnx.variants import ATTENTION, PAIRS
        from lissom.backends.onnxruntime.crossover import affordable_lengths, tell_lengths, time_lengths

        if not program.nodes(block_sparse_attention):
            return best
        reason, places = ungathered(start.exported), self._write(program, start.exported, chosen)[1][PAIRS]
        if reason is not None:
            notes.append(f"block-sparse attention is computed with a mask of all pairs, since {reason}")
        if not places:
            return best
        words = f"block-sparse attention, {places} times,"
        lengths = affordable_lengths(program, example)
        if not lengths:
            notes.append(f"{words} is by key blocks: the scores of all pairs take too much memory to be tried")
            return best
        try:
            other = self._open(program, self._write(program, start.exported, list({*chosen, ATTENTION, PAIRS}))[0])
            confirm(self.name, other, program, example, start.allowed)
        # As above.
        except Exception as error:
            notes.append(f"{words} is by key blocks; with a mask of all pairs it fails here: {_reason(error)}")
            return best
        found = time_lengths(best, other, lengths, self.timing_seconds)
        faster = found[0].pairs_ms < _GAIN * found[0].blocks_ms
        notes.append(f"{words} is {'with a mask of all pairs' if faster else 'by key blocks'}: {tell_lengths(found)}")
        return other if faster else best

    def _products(self, program: Program, session: Session) -> str:
        """The products of integers in the graph ONNX Runtime makes of a session's model, and how many: `36 MatMulNBits`."""
        from lissom.backends.onnx.integer_matmul import PRODUCTS
        from lissom.backends.onnxruntime.session import optimized_operators

        with TemporaryDirectory(prefix="lissom-") as folder:
            found = optimized_operators(session.path, self._options(program), Path(folder))
        return ", ".join(f"{count} {name}" for name, count in found.most_common() if name in PRODUCTS)

    def _start(self, program: Program, example: Sample, decompose: bool) -> _Start:
        """The exported model, and its first form opened and confirmed. Raises: UnsupportedError, VerifyError."""
        from lissom.backends.onnx.export import export_onnx
        from lissom.backends.onnx.integer_matmul import quantized_layers, simulated
        from lissom.backends.onnx.variants import INTEGERS

        try:
            exported = export_onnx(program, example, decompose)
        except UnsupportedError:
            raise
        # Neither the exporter's errors nor the runtime's have a common class.
        except Exception as error:
            raise self._unsupported(program, error) from error
        layers = quantized_layers(exported)
        left = simulated(layers, self.accuracy_level)
        if len(left) < len(layers):
            try:
                notes = [self._check_integers(program, example, exported)]
                session = self._open(program, self._write(program, exported, [INTEGERS])[0])
                allowed = _ROUNDED if self.accuracy_level and any(layer.rounded is None for layer in layers) else 0.0
                error = confirm(self.name, session, program, example, allowed)
                if allowed:
                    notes.append(f"accuracy_level={self.accuracy_level} changes what is answered by {error:.1g} relative")
                return _Start(exported, session, INTEGERS, allowed, layers, left, notes)
            # Processors without such instructions, and some versions, add up integers wrongly.
            except Exception as error:
                left = simulated(layers, self.accuracy_level, f"its integer kernels fail here or are wrong: {_reason(error)}")
        try:
            session = self._open(program, self._write(program, exported, [])[0])
        except UnsupportedError:
            raise
        except Exception as error:
            raise self._unsupported(program, error) from error
        confirm(self.name, session, program, example)
        return _Start(exported, session, "", 0.0, layers, left, [])

    def _check_integers(self, program: Program, example: Sample, exported: ir.Model) -> str:
        """Compare each product of integers with the same in floating point, given the same values; what was found, in words.

        Behind values that are rounded two correct programs drift apart, so the end of a program tells little of its parts.

        Raises: VerifyError when one differs.
        """
        from lissom.backends.onnx.export import input_names, output_names, save_onnx, state_names
        from lissom.backends.onnx.variants import write_check
        from lissom.backends.onnxruntime.session import open_session

        with TemporaryDirectory(prefix="lissom-") as folder:
            path = save_onnx(write_check(exported, self.accuracy_level), Path(folder))
            session = open_session(path, self._options(program))
            past, present = state_names(program)
            names = [item.name for item in session.get_outputs()][len(output_names(program)) + len(present) :]
            state = [program.weight(name).detach() for name in program.state]
            given = zip([*input_names(program), *past], [*example, *state], strict=True)
            errors: Any = session.run(names, {name: tensor.cpu().numpy() for name, tensor in given})
        worst = max(float(error) for error in errors)
        allowed = _ROUNDED_LOCALLY if self.accuracy_level else LOCAL_TOLERANCE
        if not worst <= allowed:
            raise VerifyError(f"a product of integers is off by {worst:.2g} relative, allowed {allowed:.2g}")
        return f"products of integers differ from the same in floating point by {worst:.1g} relative at most"

    def _unsupported(self, program: Program, error: Exception) -> UnsupportedError:
        return UnsupportedError(f"ONNX Runtime cannot run {program.name}: {_reason(error)}; choose backend 'eager'")

    def _write(self, program: Program, exported: ir.Model, chosen: Sequence[str]) -> tuple[ir.Model, dict[str, int]]:
        from lissom.backends.onnx.chunks import CPU_BYTES, OTHER_BYTES
        from lissom.backends.onnx.variants import write_form
        from lissom.backends.onnxruntime.session import CPU

        chunk_bytes = CPU_BYTES if self._options(program).providers[0][0] == CPU else OTHER_BYTES
        return write_form(exported, chosen, accuracy_level=self.accuracy_level, chunk_bytes=chunk_bytes)

    def _open(self, program: Program, model: ir.Model) -> Session:
        from lissom.backends.onnx.export import save_onnx

        folder = Path(mkdtemp(prefix="lissom-"))
        try:
            return self._session(program, save_onnx(model, folder), keep=False)
        except BaseException:
            shutil.rmtree(folder)
            raise

    def _session(self, program: Program, path: Path, keep: bool) -> Session:
        from lissom.backends.onnxruntime.session import Session, fallen_back, open_session, placed_nodes

        options = self._options(program)
        session = open_session(path, options)
        first = options.providers[0][0]
        warning = fallen_back(placed_nodes(session), first) if first != "CPUExecutionProvider" else None
        return Session(program, path, session, [warning] if warning else [], keep)

    def _options(self, program: Program) -> SessionOptions:
        from lissom.backends.onnxruntime.session import SessionOptions, choose_providers

        providers = choose_providers(program, self.providers, self.provider_options)
        return SessionOptions(providers, self.threads or torch.get_num_threads(), self.arena, self.optimization)

    def save_files(self, executable: Executable, folder: Path) -> None:
        """The ONNX file, which any ONNX Runtime opens, and its weights."""
        from lissom.backends.onnxruntime.session import Session

        assert isinstance(executable, Session)
        for file in executable.path.parent.iterdir():
            shutil.copyfile(file, folder / file.name)
        elements = executable.cutting.elements if executable.cutting is not None else None
        (folder / CUTTING).write_text(json.dumps({"elements": elements}), encoding="utf-8")

    def native_code(self, *, saved_options: bool) -> str | None:
        return unlisted_option(self.providers, self.provider_options, self.threads) if saved_options else None

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """The ONNX file opened, its weights mapped."""
        missing = self.missing()
        if missing is not None:
            raise UnsupportedError(missing)
        from lissom.backends.microbatches import Cutting, batch_inputs
        from lissom.backends.onnx.export import MODEL
        from lissom.backends.onnxruntime.stored import check_stored

        try:
            check_stored(folder / MODEL)
            session = self._session(program, folder / MODEL, keep=True)
            elements, batch = json.loads((folder / CUTTING).read_text(encoding="utf-8"))["elements"], batch_inputs(program)
            session.cutting = Cutting(batch, int(elements)) if elements and batch else None
            return session
        except LissomError:
            raise
        # ONNX Runtime's errors have no common class.
        except Exception as error:
            raise ArtifactError(f"'{folder / MODEL}' does not open: {_reason(error)}; compile the model again") from error


@dataclass(frozen=True)
class _Start:
    """An exported model, and its first form: `integers`, or as it is. allowed: the error that form may show.

    layers: those that are quantized. left: those of them that have no kernel. notes: for the reader.
    """

    exported: ir.Model
    session: Session
    form: str
    allowed: float
    layers: Sequence[Layer]
    left: Sequence[SimulatedLayer]
    notes: list[str]


def _check(program: Program) -> None:
    """Refuse what cannot be exported, or what ONNX Runtime has no kernels for. Raises: UnsupportedError."""
    check_tensors(OnnxRuntime.name, program)
    for node in program:
        if nodes.is_tensor(node) and node.op != "output":
            found = nodes.tensor_type(node)
            if found.dtype == torch.bfloat16 and found.device.type == "cpu":
                raise UnsupportedError(
                    f"ONNX Runtime lacks kernels of bfloat16 on a CPU, and {program.name} has it in '{node.name}'; "
                    f"leave the cast out, or choose backend 'eager'"
                )


def _timed_samples(program: Program, example: Sample) -> list[Sample]:
    """The example, and the same with every size that varies four times as large, where the program takes that.

    Of a program with state the smallest too: tokens come one by one behind a prompt.
    """
    signature = program.signature
    sizes = {
        symbol: min(4 * size, signature.dimensions[symbol].maximum or 4 * size)
        for symbol, size in signature.sizes_of(example).items()
    }
    others = [resize(signature, example, sizes), *(smallest_samples(program, example) if program.state else [])]
    samples = [example]
    for sample in others if sizes else []:
        # Too large, or drawn so that the model refuses it.
        with suppress(InputError, RuntimeError, ValueError, IndexError):
            signature.check_sizes(sample)
            with torch.no_grad(), kept_state(program):
                program.run(sample)
            samples.append(sample)
    return samples


def _seconds(session: Session, sample: Sample) -> float:
    """What the second call takes."""
    taken = 0.0
    with restored_state(session):
        for _ in range(2):
            started = time.perf_counter()
            session(sample)
            taken = time.perf_counter() - started
    return taken


def _compare(other: Session, best: Session, samples: Sequence[Sample], seconds: float, least: int = 5) -> tuple[bool, str]:
    """Whether the other session is faster over all, and the times in words.

    Of the runs the faster quarter is looked at, which other work on the machine disturbs least.
    """
    ratios: list[float] = []
    told: list[str] = []
    for sample in samples:
        with restored_state(other, best):
            timings = time_calls({"with": partial(other, sample), "without": partial(best, sample)}, seconds, least, ENOUGH)
        ratios.append(timings["with"].low_ms / timings["without"].low_ms)
        shapes = ", ".join(str(list(tensor.shape)) for tensor in sample)
        told.append(f"{timings['with']} ms with it and {timings['without']} ms without on inputs {shapes}")
    return geometric_mean(ratios) < _GAIN, "; ".join(told)


def _reason(error: BaseException) -> str:
    """What lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return kind_and_reason(error)
