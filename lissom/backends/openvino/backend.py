"""OpenVINO: the program exported to ONNX, converted to OpenVINO's IR, compiled for a CPU, and checked against the program.

The IR is the file that is compiled, saved and exported. It holds standard operators and Q/DQ, which OpenVINO fuses, and runs
without Lissom.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, ClassVar

import torch

from lissom.backends.base import Backend, Executable, confirm
from lissom.backends.exported import check_steps, check_tensors, device_of, leaves_of
from lissom.backends.simulated_layers import SimulatedLayer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import PLAIN_RNNS
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.errors import ArtifactError, LissomError, UnsupportedError, VerifyError
from lissom.passes.canonical.fold_constants import FoldConstants
from lissom.passes.lowering.lower_sparse_attention import LowerSparseAttention
from lissom.passes.quantize.fold_quantized_weights import FoldQuantizedWeights

if TYPE_CHECKING:
    from lissom.backends.openvino.network import Network

XML, BIN = "model.xml", "model.bin"
"""The files of the IR in an artifact."""
MOST_THREADS = 1024


@dataclass(frozen=True)
class OpenVino(Backend):
    """Runs the program with OpenVINO on a CPU; needs the packages of the extra `openvino`.

    Attributes:
        threads: of a call; by default as many as PyTorch uses.

    Examples:
        >>> import torch, lissom
        >>> fast = lissom.compile(torch.nn.Linear(4, 2), torch.randn(3, 4), backend=lissom.OpenVino(threads=1))
        >>> fast(torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """

    name: ClassVar[str] = "openvino"
    maps_files: ClassVar[bool] = True

    threads: int | None = None

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        return (FoldConstants(shared=True), FoldQuantizedWeights(), LowerSparseAttention(always=True, causal=False))

    def simulated(self, program: Program) -> Sequence[SimulatedLayer]:
        """None here; the network sets `simulated` from the graph that OpenVINO runs."""
        return ()

    def missing(self) -> str | None:
        absent = [name for name in ("openvino", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        return f"backend 'openvino' needs {' and '.join(absent)}; pip install 'lissom[openvino]', or choose backend 'eager'"

    def build(self, program: Program, example: Sample) -> Executable:
        """The `Network` of the program.

        Raises:
            UnsupportedError: when the program returns sizes, or holds what ONNX or OpenVINO cannot do.
            VerifyError: when the network gives something else than the program.
        """
        folder = Path(mkdtemp(prefix="lissom-"))
        try:
            network, _ = self.write(program, example, folder / XML)
        except BaseException:
            shutil.rmtree(folder)
            raise
        network.delete_with(folder)
        return network

    def write(self, program: Program, example: Sample, path: Path) -> tuple[Network, float]:
        """Write a lowered program as IR, and open and confirm it; the network, and its relative error to the program.

        Args:
            path: of the .xml; the .bin is beside it.

        Raises:
            UnsupportedError: as `build`.
            VerifyError: as `build`.
        """
        check_program(program)
        try:
            return self._write(program, example, path, decompose=False)
        # The exporter may translate the decomposition of an operator that it cannot translate, or translates wrongly.
        except (UnsupportedError, VerifyError):
            return self._write(program, example, path, decompose=True)

    def _write(self, program: Program, example: Sample, path: Path, decompose: bool) -> tuple[Network, float]:
        from lissom.backends.openvino.conversion import write_ir
        from lissom.backends.openvino.network import open_network

        quantized = write_ir(program, example, path, decompose=decompose, threads=self._threads)
        network = open_network(program, path, self._threads)
        network.set_layers(quantized)
        return network, confirm(self.name, network, program, example)

    @property
    def _threads(self) -> int:
        return self.threads or torch.get_num_threads()

    def save_files(self, executable: Executable, folder: Path) -> None:
        """The IR, which any OpenVINO opens."""
        from lissom.backends.openvino.network import Network

        assert isinstance(executable, Network)
        for name in (XML, BIN):
            shutil.copyfile(executable.path.with_name(name), folder / name)

    def native_code(self, *, saved_options: bool) -> str | None:
        """None: an IR of standard operators is data."""
        threads = self.threads
        if saved_options and threads is not None and (type(threads) is not int or not 1 <= threads <= MOST_THREADS):
            raise ValueError(f"threads is {threads!r:.20}, and {MOST_THREADS} are the most")
        return None

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """Open the IR, with memory-mapped weights, after checking it."""
        missing = self.missing()
        if missing is not None:
            raise UnsupportedError(missing)
        from lissom.backends.openvino.network import open_network, reason_of
        from lissom.backends.openvino.stored import check_stored

        path = folder / XML
        try:
            check_stored(path, folder / BIN)
            return open_network(program, path, self._threads)
        except LissomError:
            raise
        # OpenVINO's errors have no common class.
        except Exception as error:
            raise ArtifactError(f"'{path}' does not open: {reason_of(error)}; compile the model again") from error


def check_program(program: Program) -> None:
    """Refuse programs that cannot be exported, or that OpenVINO would compute in less precision. Raises UnsupportedError."""
    check_tensors(OpenVino.name, program)
    check_steps(OpenVino.name, program, PLAIN_RNNS)
    device = device_of(program)
    if device.type != "cpu":
        raise UnsupportedError(
            f"backend 'openvino' runs on a CPU, and {program.name} is on {device}; compile with device='cpu', or choose "
            f"backend 'eager'"
        )
    for node in (*program.placeholders, *leaves_of(program)):
        if nodes.is_tensor(node) and nodes.tensor_type(node).dtype == torch.float64:
            raise UnsupportedError(
                f"OpenVINO computes float64 in float32 on a CPU, and {program.name} has it in {place(program, node)}; "
                f"convert the model to float32, or choose backend 'eager'"
            )
