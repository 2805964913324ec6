"""What a backend is: passes that lower a program, and a way to build what runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from lissom.backends.kernels import SimulatedLayer, simulated_layers
from lissom.compiler.errors import InputError, UnsupportedError, VerifyError
from lissom.compiler.kinds import Pass
from lissom.compiler.program import Program
from lissom.compiler.rounding import SHARE, rounding_loss, rounds_values
from lissom.compiler.samples import Sample, check_samples, resize
from lissom.compiler.verify import compare, run_original, tolerance_of

Executable = Callable[[Sequence[torch.Tensor]], Sequence[object]]
"""Flat inputs in the order of the program's placeholders; flat outputs."""
_STATE = "state"


def with_state(executable: Executable, state: Mapping[str, torch.Tensor]) -> Executable:
    """The executable, which says as its `state` in which tensors it keeps the program's; what is written there, it reads."""
    setattr(executable, _STATE, dict(state))
    return executable


def state_of(executable: Executable) -> dict[str, torch.Tensor] | None:
    """The tensors an executable keeps its program's state in, by name; None where they are out of reach."""
    return getattr(executable, _STATE, None)


@dataclass(frozen=True)
class Backend(ABC):
    """A way to run programs; its fields are its options.

    movable: True when what was saved for one kind of device can be loaded for another.
    """

    name: ClassVar[str]
    movable: ClassVar[bool] = False

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

    def load_executable(self, program: Program, folder: Path) -> Executable:
        """What runs the program, from the files `save_files` wrote, which stay as they are.

        Raises: ArtifactError when they do not run here; UnsupportedError when this machine lacks what they need.
        """
        raise UnsupportedError(f"what backend '{self.name}' builds cannot be loaded; compile the model again")


def confirm(name: str, executable: Executable, program: Program, example: Sample, allowed: float = 0.0) -> float:
    """Run what a backend built from a program without state beside it: on the example, at other sizes, and at the smallest.

    allowed: the relative error it may show, where that is more than two correct programs may. Returns the one it shows.

    Raises: VerifyError when it does not run, or gives something else.
    """
    samples, wanted = run_original(program, [*check_samples(program.signature, example), *_smallest(program, example)])
    allowed = max(allowed, tolerance_of(program))
    worst = 0.0
    if rounds_values(program):
        allowed = max(allowed, SHARE * rounding_loss(program, samples, wanted))
    for sample, outputs in zip(samples, wanted, strict=True):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in sample)
        try:
            found = list(executable(sample))
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


def _smallest(program: Program, example: Sample) -> list[Sample]:
    """The example at the smallest sizes the signature promises, where compilers go wrong; none when it refuses them."""
    signature = program.signature
    sample = resize(signature, example, {symbol: dimension.minimum for symbol, dimension in signature.dimensions.items()})
    with suppress(InputError):
        signature.check_sizes(sample)
        return [sample]
    return []
