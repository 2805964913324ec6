"""The interface of backends: passes that lower a program, and a build step that makes an executable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch

from lissom.backends.simulated_layers import SimulatedLayer, simulated_layers
from lissom.compiler.analysis.cost import flops
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples, few_rows, smallest_samples
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.verify.equality import require_built
from lissom.errors import UnsupportedError
from lissom.inspect.hot_layers import LayerTimes
from lissom.measure.machine import Machine

WEIGHTS_FILE = "weights.safetensors"
"""The file of an artifact with the program's weights."""

Executable = Callable[[Sequence[torch.Tensor]], Sequence[object]]
"""Takes flat inputs in the order of the program's placeholders; returns flat outputs. One with state is `Stateful` too."""


@runtime_checkable
class Stateful(Protocol):
    """An executable that keeps state, such as a KV cache, between calls. It starts with its own copy of the program's state."""

    def state(self) -> dict[str, torch.Tensor]:
        """The state by name: its own memory, valid until the next call.

        Writing to a tensor changes the state: `zero_()` empties a cache, `copy_(tensor[rows])` reorders its rows.
        """
        ...


def state_of(executable: Executable) -> dict[str, torch.Tensor]:
    """The state of an executable, as `Stateful.state` gives it; empty for one without state."""
    return executable.state() if isinstance(executable, Stateful) else {}


@contextmanager
def restored_state(*executables: Executable) -> Generator[None]:
    """Restore the state of the executables after the block."""
    saved = [
        (executable, {name: tensor.clone() for name, tensor in state_of(executable).items()}) for executable in executables
    ]
    try:
        yield
    finally:
        for executable, tensors in saved:
            for name, tensor in state_of(executable).items():
                tensor.copy_(tensors[name])


@dataclass(frozen=True)
class Backend(ABC):
    """Runs programs; its fields are its options.

    Attributes:
        movable: True when an artifact saved for one kind of device can be loaded for another.
        runs_ranks: True when it runs a program partitioned for several ranks.
        maps_files: True when it maps files of an artifact itself.
    """

    name: ClassVar[str]
    movable: ClassVar[bool] = False
    runs_ranks: ClassVar[bool] = False
    maps_files: ClassVar[bool] = False

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        """Exact passes that lower a program on `device` to the operators of this backend; checked like any other pass."""
        return ()

    def simulated(self, program: Program) -> Sequence[SimulatedLayer]:
        """The quantized layers of a lowered program that this backend has no kernel for.

        A backend that knows only after the build sets `simulated` on the executable, and returns nothing here.
        """
        return simulated_layers(program)

    def missing(self) -> str | None:
        """The reason this machine cannot run this backend, in one sentence; None if it can."""
        return None

    @abstractmethod
    def build(self, program: Program, example: Sample) -> Executable:
        """Build the executable of a program.

        The executable shares the program's weights and copies only those it writes.

        Args:
            example: flat inputs.
        """

    def confirm(self, executable: Executable, program: Program, example: Sample) -> None:
        """Compare an executable with its program, unless `build` does; one that is only timed is not compared.

        Raises:
            VerifyError: as the function `confirm`.
        """
        return

    def settle(self, program: Program) -> None:
        """Move the weights of a program that was built to where calls read them fastest; their values and addresses stay.

        It takes as long as many calls, so a program that is only timed may do without.
        """
        return

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
        """The time of every layer of a lowered program on flat inputs, and the kernels that run them.

        Args:
            seconds: of all runs together.
            machine: its ceilings, where they are known.
            measured: the names of the nodes for which PyTorch's kernel was measured faster than ours. State is left as it is.

        Raises:
            UnsupportedError: when this backend does not run the layers one by one.
        """
        raise UnsupportedError(
            f"backend '{self.name}' does not run the layers of {program.name} one by one on a CPU, and names no kernels; "
            f"compile for backend 'eager' on a CPU to see them"
        )

    def save_files(self, executable: Executable, folder: Path) -> None:
        """Write the files that `load_executable` needs besides the program into the folder of an artifact.

        They are plain files without subfolders, and contain no pickles.

        Raises:
            UnsupportedError: when this backend's executables cannot be saved.
            OSError: when a file cannot be written.
        """
        raise UnsupportedError(f"what backend '{self.name}' builds cannot be saved; choose backend 'eager'")

    def transposed_weights(self, program: Program, folder: Path) -> frozenset[str]:
        """The weights, by name, that the files of `save_files` hold transposed; the artifact then holds them so too."""
        return frozenset()

    def share_weights(self, folder: Path) -> None:
        """Let the files of `save_files` read weights from the artifact's own file, `WEIGHTS_FILE`, and drop their copies."""
        return

    def native_code(self, *, saved_options: bool) -> str | None:
        """The native code that an artifact of this backend loads, in words; None for data alone.

        Args:
            saved_options: True when this backend's options come from the artifact and not from the caller.

        Raises:
            ValueError: for saved options of a wrong type.
        """
        return None

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """Load the executable from the files that `save_files` wrote, without changing them.

        Raises:
            ArtifactError: when they do not run here.
            UnsupportedError: when this machine lacks their requirements.
        """
        raise UnsupportedError(f"what backend '{self.name}' builds cannot be loaded; compile the model again")


def confirm(name: str, executable: Executable, program: Program, example: Sample, allowed: float = 0.0) -> float:
    """Compare an executable with its program on the example, at other sizes, and at the smallest sizes, twice each.

    State is compared too, and restored.

    Args:
        allowed: the relative error it may have, where that is more than two correct programs differ by. Returns its relative
            error.

    Raises:
        VerifyError: when it does not run, gives other outputs, or returns memory that it uses again.
    """
    smallest = (sample for sample in smallest_samples(program.signature, example) if not all(map(torch.equal, sample, example)))
    samples = [*check_samples(program.signature, few_rows(program.signature, example, flops(program))), *smallest]
    return require_built(f"what backend '{name}' built", partial(_call, executable), program, samples, allowed)


def _call(executable: Executable, sample: Sample) -> list[object]:
    """The outputs of one call, and the state after it, which is then restored."""
    with restored_state(executable):
        return [*executable(sample), *(tensor.clone() for tensor in state_of(executable).values())]
