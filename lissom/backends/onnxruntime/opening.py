"""A program exported to ONNX, and its first variant opened by ONNX Runtime and compared with the program."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import onnx_ir as ir

from lissom.backends.base import confirm
from lissom.backends.exported import kind_and_reason, root_of
from lissom.backends.names import input_names, output_names, state_names
from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.integer_matmul import PRODUCTS
from lissom.backends.onnx.quantized_layers import Layer, quantized_layers, simulated
from lissom.backends.onnx.sparse_attention import CPU_BYTES, OTHER_BYTES
from lissom.backends.onnx.variants import INTEGERS, write_check, write_variant
from lissom.backends.onnxruntime.session import CPU, Session, SessionOptions, open_session, optimized_operators, session_of
from lissom.backends.simulated_layers import SimulatedLayer
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import LOCAL_TOLERANCE
from lissom.errors import UnsupportedError, VerifyError

_QUANTIZED, _QUANTIZED_LAYER = 0.5, 0.03
"""The relative error that quantizing activations to int8, 4e-3 of the largest of a group, may cause over tens of layers, and
in one."""


@dataclass(frozen=True)
class Opener:
    """Writes variants of the ONNX model of one program, and opens them.

    Attributes:
        backend: the name that errors give.
        accuracy_level: as in `OnnxRuntime`.
    """

    backend: str
    program: Program
    options: SessionOptions
    accuracy_level: int

    def write(self, exported: ir.Model, chosen: Sequence[str]) -> tuple[ir.Model, dict[str, int]]:
        """The model with the rewrites `chosen`, and how often each applied."""
        chunk_bytes = CPU_BYTES if self.options.providers[0][0] == CPU else OTHER_BYTES
        return write_variant(exported, chosen, accuracy_level=self.accuracy_level, chunk_bytes=chunk_bytes)

    def open(self, model: ir.Model) -> Session:
        """A session of the model, which is written to a temporary folder."""
        folder = Path(mkdtemp(prefix="lissom-"))
        try:
            return session_of(self.program, save_onnx(model, folder), self.options)
        except BaseException:
            shutil.rmtree(folder)
            raise

    def confirmed(self, model: ir.Model, example: Sample, allowed: float = 0.0) -> tuple[Session, float]:
        """A session of the model, and its relative error to the program.

        Raises:
            VerifyError: when that is more than `allowed` and more than two correct programs may differ.
        """
        session = self.open(model)
        return session, confirm(self.backend, session, self.program, example, allowed)


@dataclass(frozen=True)
class Start:
    """An exported model and its first variant.

    Attributes:
        chosen: the rewrites of the first variant, INTEGERS or none.
        allowed: the relative error it may show.
        layers: the quantized layers.
        left: those of them without a kernel.
    """

    exported: ir.Model
    session: Session
    chosen: tuple[str, ...] = ()
    allowed: float = 0.0
    layers: Sequence[Layer] = ()
    left: Sequence[SimulatedLayer] = ()
    notes: list[str] = field(default_factory=list[str])


def start(opener: Opener, example: Sample) -> Start:
    """The exported model, and its first variant opened and confirmed.

    Raises:
        UnsupportedError: when the program cannot be exported or opened.
        VerifyError: when the session gives something else.
    """
    try:
        return _start(opener, example, decompose=False)
    # The exporter may be able to translate the decomposition of an operator that it cannot translate, or translates wrongly.
    except (UnsupportedError, VerifyError):
        return _start(opener, example, decompose=True)


def integer_products(opener: Opener, session: Session) -> str:
    """The integer products in the graph that ONNX Runtime optimizes a session's model to: `36 MatMulNBits`."""
    with TemporaryDirectory(prefix="lissom-") as folder:
        operators = optimized_operators(session.path, opener.options, Path(folder))
    return ", ".join(f"{count} {name}" for name, count in operators.most_common() if name in PRODUCTS)


def root_reason(error: BaseException) -> str:
    """The class and first line of the error at the end of a chain of causes."""
    return kind_and_reason(root_of(error))


def _start(opener: Opener, example: Sample, decompose: bool) -> Start:
    # The exporter runs translations and decompositions of any operator.
    with _refused(opener):
        exported = export_onnx(opener.program, example, decompose)
    layers = quantized_layers(exported)
    left = simulated(layers, opener.accuracy_level)
    if len(left) < len(layers):
        try:
            return _start_with_integers(opener, example, exported, layers, left)
        # ONNX Runtime's errors have no common class; some processors and versions give wrong sums, a VerifyError.
        except Exception as error:
            reason = f"its integer kernels fail here or are wrong: {root_reason(error)}"
            left = simulated(layers, opener.accuracy_level, reason)
    with _refused(opener):
        session = opener.open(opener.write(exported, [])[0])
    confirm(opener.backend, session, opener.program, example)
    return Start(exported, session, layers=layers, left=left)


@contextmanager
def _refused(opener: Opener) -> Generator[None]:
    """Raise UnsupportedError for any error of the block: those of the exporter and of ONNX Runtime have no common class."""
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        name, reason = opener.program.name, root_reason(error)
        raise UnsupportedError(f"ONNX Runtime cannot run {name}: {reason}; choose backend 'eager'") from error


def _start_with_integers(
    opener: Opener, example: Sample, exported: ir.Model, layers: Sequence[Layer], left: Sequence[SimulatedLayer]
) -> Start:
    """The first variant with its quantized layers computed from integers. Raises VerifyError; any error of ONNX Runtime."""
    notes = [_check_integers(opener, example, exported)]
    level = opener.accuracy_level
    allowed = _QUANTIZED if level and any(layer.rounded is None for layer in layers) else 0.0
    session, error = opener.confirmed(opener.write(exported, [INTEGERS])[0], example, allowed)
    if allowed:
        notes.append(f"accuracy_level={level} changes the outputs by {error:.1g} relative")
    return Start(exported, session, (INTEGERS,), allowed, layers, left, notes)


def _check_integers(opener: Opener, example: Sample, exported: ir.Model) -> str:
    """Compare each integer product with the same product in floating point, on the same activations; the result in words.

    Two correct programs diverge after a quantized layer, so the outputs of the program tell little about single layers.

    Raises:
        VerifyError: when one differs.
    """
    program = opener.program
    with TemporaryDirectory(prefix="lissom-") as folder:
        path = save_onnx(write_check(exported, opener.accuracy_level), Path(folder))
        session = open_session(path, opener.options)
        past, present = state_names(program)
        names = [output.name for output in session.get_outputs()][len(output_names(program)) + len(present) :]
        state = [program.weight(name).detach() for name in program.state]
        given = zip([*input_names(program), *past], [*example, *state], strict=True)
        errors: Any = session.run(names, {name: tensor.cpu().numpy() for name, tensor in given})
    worst = max(float(error) for error in errors)
    allowed = _QUANTIZED_LAYER if opener.accuracy_level else LOCAL_TOLERANCE
    if not worst <= allowed:
        raise VerifyError(f"an integer product has a relative error of {worst:.2g}, allowed {allowed:.2g}")
    return f"integer products differ from the same in floating point by {worst:.1g} relative at most"
