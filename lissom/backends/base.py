"""What a backend is: passes that lower a program, and a way to build what runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch

from lissom.backends.kernels import SimulatedLayer, simulated_layers
from lissom.compiler.errors import InputError, UnsupportedError, VerifyError
from lissom.compiler.kinds import Pass
from lissom.compiler.program import Program
from lissom.compiler.rounding import SHARE, rounding_loss, rounds_values
from lissom.compiler.samples import Sample, check_samples, resize
from lissom.compiler.verify import compare, run_original, tolerance_of

Executable = Callable[[Sequence[torch.Tensor]], Sequence[object]]
"""Flat inputs in the order of the program's placeholders; flat outputs. One that keeps state is `Stateful` too."""


@runtime_checkable
class Stateful(Protocol):
    """An executable that keeps state from call to call. It starts with that of the program, of which it has its own copy."""

    def state(self) -> dict[str, torch.Tensor]:
        """The state by the names of the program: the memory itself, until the next call.

        To write to a tensor is to change the state: `zero_()` empties a cache, `copy_(tensor[rows])` reorders its rows.
        """
        ...


def state_of(executable: Executable) -> dict[str, torch.Tensor]:
    """The state an executable keeps, as `Stateful.state` gives it; empty for one that keeps none."""
    return executable.state() if isinstance(executable, Stateful) else {}


@contextmanager
def restored_state(*executables: Executable) -> Generator[None]:
    """Put the state of the executables back to what it was."""
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
    """A way to run programs; its fields are its options.

    movable: True when what was saved for one kind of device can be loaded for another.
    runs_ranks: True when it runs a program cut for several ranks.
    """

    name: ClassVar[str]
    movable: ClassVar[bool] = False
    runs_ranks: ClassVar[bool] = False

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        """Exact passes that bring a program on `device` into the form this backend runs fast; checked like any other."""
        return ()

    def simulated(self, program: Program) -> Sequence[SimulatedLayer]:
        """The quantized layers of a lowered program that this backend has no kernel for.

        A backend that learns it when it builds says so of the executable, as its `simulated`, and nothing here.
        """
        return simulated_layers(program)

    def missing(self) -> str | None:
        """Why this machine cannot run it, in one sentence; None when it can."""
        return None

    @abstractmethod
    def build(self, program: Program, example: Sample) -> Executable:
        """What runs the program; `example` are flat inputs of it.

        The executable keeps the program's weights and copies none it does not write.
        """

    def save_files(self, executable: Executable, folder: Path) -> None:
        """Write into the folder of an artifact what `load_executable` needs beside the program.

        They are plain files without folders, and nothing in them is pickled.

        Raises: UnsupportedError when this backend's executables cannot be saved; OSError.
        """
        raise UnsupportedError(f"what backend '{self.name}' builds cannot be saved; choose backend 'eager'")

    def native_code(self, *, saved_options: bool) -> str | None:
        """What of an artifact of this backend runs as native code when it is loaded, in words; None for data alone.

        saved_options: this backend's options come from the artifact, and not from the caller.

        Raises: ValueError for saved options of another kind than they should be.
        """
        return None

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """What runs the program, from the files `save_files` wrote, which stay as they are.

        Raises: ArtifactError when they do not run here; UnsupportedError when this machine lacks what they need.
        """
        raise UnsupportedError(f"what backend '{self.name}' builds cannot be loaded; compile the model again")


def confirm(name: str, executable: Executable, program: Program, example: Sample, allowed: float = 0.0) -> float:
    """Run what a backend built from a program beside it: on the example, at other sizes, and at the smallest.

    State is compared too, and put back to what it was.

    allowed: the relative error it may show, where that is more than two correct programs may. Returns the one it shows.

    Raises: VerifyError when it does not run, or gives something else.
    """
    samples, wanted = run_original(program, [*check_samples(program.signature, example), *smallest_samples(program, example)])
    allowed = max(allowed, tolerance_of(program))
    worst = 0.0
    if rounds_values(program):
        allowed = max(allowed, SHARE * rounding_loss(program, samples, wanted))
    for sample, outputs in zip(samples, wanted, strict=True):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in sample)
        try:
            with restored_state(executable):
                found = [*executable(sample), *(tensor.clone() for tensor in state_of(executable).values())]
        except Exception as error:
            raise VerifyError(
                f"what backend '{name}' built from {program.name} does not run on inputs {shapes}: "
                f"{type(error).__name__}: {error}; choose another backend"
            ) from error
        error = compare([outputs], [found]).relative_error
        worst = max(worst, error)
        if error > allowed:
            raise VerifyError(
                f"what backend '{name}' built from {program.name} differs from the program by {error:.2g} relative on inputs "
                f"{shapes}, allowed {allowed:.2g}; choose another backend"
            )
    return worst


def smallest_samples(program: Program, example: Sample) -> list[Sample]:
    """The example at the smallest sizes the signature promises, where compilers go wrong; none when it refuses them."""
    signature = program.signature
    sample = resize(signature, example, {symbol: dimension.minimum for symbol, dimension in signature.dimensions.items()})
    with suppress(InputError):
        signature.check_sizes(sample)
        return [sample]
    return []
