"""ONNX Runtime: the program exported to ONNX, opened by an inference session, and checked against the program.

The file is standard ONNX, with operators of `com.microsoft` where they were measured faster, and runs without Lissom.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from lissom.backends.base import Backend, Executable
from lissom.backends.exported import check_steps, check_tensors, kind_and_reason, read_json
from lissom.backends.onnxruntime.session_options import unlisted_option
from lissom.backends.simulated_layers import SimulatedLayer, account
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import PLAIN_RNNS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.errors import ArtifactError, LissomError, UnsupportedError
from lissom.inspect.hot_layers import LayerTimes
from lissom.measure.machine import Machine
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.lowering.lower_sparse_attention import LowerSparseAttention
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

if TYPE_CHECKING:
    from lissom.backends.onnxruntime.session import SessionOptions

CUTTING = "batches.json"
"""The file of an artifact with the microbatch size."""


@dataclass(frozen=True)
class OnnxRuntime(Backend):
    """Runs the program with ONNX Runtime; needs the packages of the extra `onnx` or `onnx-gpu`.

    Attributes:
        providers: execution providers; the first that supports a node runs it. By default CUDA for a program on CUDA, then the
            CPU.
        provider_options: options by provider, passed to ONNX Runtime.
        threads: per operator; by default as many as PyTorch uses.
        arena: keep memory between calls.
        optimization: the graph optimization level of ONNX Runtime.
        timing_seconds: how long each variant of the model is timed, at each of two sizes.
        accuracy_level: of weight-only quantized layers: 0 keeps activations in floating point; 4 quantizes them to int8 in
            groups, which is faster, and the report gives the error.

    Examples:
        >>> import torch, lissom
        >>> fast = lissom.compile(torch.nn.Linear(4, 2), torch.randn(3, 4), backend=lissom.OnnxRuntime(threads=1))
        >>> fast(torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """

    name: ClassVar[str] = "onnxruntime"
    maps_files: ClassVar[bool] = True

    providers: tuple[str, ...] = ()
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    threads: int | None = None
    arena: bool = True
    optimization: Literal["none", "basic", "extended", "all"] = "all"
    timing_seconds: float = 0.3
    accuracy_level: Literal[0, 4] = 0

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        # Whether sparse attention is faster is timed with ONNX Runtime itself, when the model is built.
        return (FoldConstants(shared=True), FoldQuantizedWeights(), LowerSparseAttention(always=True, causal=False))

    def simulated(self, program: Program) -> Sequence[SimulatedLayer]:
        """None here; the session sets `simulated` when it is built."""
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
        """A `Session` of the fastest variant of the model; its notes say what was tried.

        Raises:
            UnsupportedError: when the program returns sizes, or holds what ONNX or its runtime cannot do.
            VerifyError: when the session gives something else than the program.
        """
        _check(program)
        # Imported here, because they are an optional dependency and take a second or two to import.
        from lissom.backends.microbatches import fastest_cutting
        from lissom.backends.onnx.translation import check_translatable
        from lissom.backends.onnxruntime.opening import Opener, integer_products, start
        from lissom.backends.onnxruntime.variant_search import fastest_variant

        check_translatable(program, "ONNX Runtime")
        opener = Opener(self.name, program, self._session_options(program), self.accuracy_level)
        first = start(opener, example)
        search = fastest_variant(opener, first, example, self.timing_seconds)
        best, notes = search.best, search.notes
        cuts = self.timing_seconds and not program.state
        cutting = fastest_cutting(best.run, program, example, self.timing_seconds) if cuts else None
        if cutting is not None:
            best.cutting = cutting[0]
            notes.append(f"large batches are computed in pieces: {cutting[1]}")
        if first.layers:
            best.quantized, best.simulated = len(first.layers), first.left
            notes.insert(0, account(first.left, len(first.layers), integer_products(opener, best)))
        best.notes += tuple(notes)
        return best

    def time_layers(
        self,
        program: Program,
        executable: Executable,
        sample: Sample,
        *,
        seconds: float,
        machine: Machine | None,
        measured: Collection[str] = (),
    ) -> LayerTimes:
        from lissom.backends.onnxruntime.profile import profiled_layers
        from lissom.backends.onnxruntime.session import CPU, Session

        options = self._session_options(program)
        if options.providers[0][0] != CPU:
            return super().time_layers(program, executable, sample, seconds=seconds, machine=machine)
        assert isinstance(executable, Session)
        return profiled_layers(program, executable, options, sample, seconds)

    def _session_options(self, program: Program) -> SessionOptions:
        from lissom.backends.onnxruntime.session import SessionOptions, choose_providers

        providers = choose_providers(program, self.providers, self.provider_options)
        return SessionOptions(providers, self.threads or torch.get_num_threads(), self.arena, self.optimization)

    def save_files(self, executable: Executable, folder: Path) -> None:
        """The ONNX file, which any ONNX Runtime opens, its weights, and the microbatch size."""
        from lissom.backends.onnxruntime.session import Session
        from lissom.backends.onnxruntime.shared_weights import write_model

        assert isinstance(executable, Session)
        write_model(executable.path, folder)
        elements = executable.cutting.elements if executable.cutting is not None else None
        (folder / CUTTING).write_text(json.dumps({"elements": elements}), encoding="utf-8")

    def transposed_weights(self, program: Program, folder: Path) -> frozenset[str]:
        from lissom.backends.onnxruntime.shared_weights import transposed_weights

        return transposed_weights(program, folder)

    def share_weights(self, folder: Path) -> None:
        from lissom.backends.onnxruntime.shared_weights import share_weights

        share_weights(folder)

    def native_code(self, *, saved_options: bool) -> str | None:
        return unlisted_option(self.providers, self.provider_options, self.threads) if saved_options else None

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """Open the ONNX file, with memory-mapped weights."""
        missing = self.missing()
        if missing is not None:
            raise UnsupportedError(missing)
        from lissom.backends.microbatches import Cutting, batch_inputs
        from lissom.backends.onnx.export import MODEL
        from lissom.backends.onnxruntime.session import session_of
        from lissom.backends.onnxruntime.stored import check_stored

        try:
            check_stored(folder / MODEL)
            session = session_of(program, folder / MODEL, self._session_options(program), keep=True)
        except LissomError:
            raise
        # ONNX Runtime's errors have no common class.
        except Exception as error:
            raise ArtifactError(
                f"'{folder / MODEL}' does not open: {kind_and_reason(error)}; compile the model again"
            ) from error
        elements = read_json(
            folder / CUTTING,
            "in which pieces batches are computed",
            lambda data: None if data["elements"] is None else int(data["elements"]),
        )
        batch = batch_inputs(program)
        session.cutting = Cutting(batch, elements) if elements and batch else None
        return session


def _check(program: Program) -> None:
    """Refuse programs that cannot be exported, or that ONNX Runtime lacks kernels for. Raises UnsupportedError."""
    check_tensors(OnnxRuntime.name, program)
    check_steps(OnnxRuntime.name, program, PLAIN_RNNS)
    for node in program:
        if nodes.is_tensor(node) and node.op != "output":
            value_type = nodes.tensor_type(node)
            if value_type.dtype == torch.bfloat16 and value_type.device.type == "cpu":
                raise UnsupportedError(
                    f"ONNX Runtime lacks kernels of bfloat16 on a CPU, and {program.name} has it in '{node.name}'; "
                    f"convert the model to float32, leave a cast to bfloat16 out, or choose backend 'eager'"
                )
