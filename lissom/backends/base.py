"""What a backend is: passes that lower a program, and a way to build what runs it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import torch

from lissom.backends.simulated_layers import SimulatedLayer, simulated_layers
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples, resize
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.verify.divergence import output_errors, run_original, shapes_of, tolerances
from lissom.compiler.verify.equality import EARLIER, shared_memory
from lissom.compiler.verify.rounding import SHARE, exact_outputs, rounding_loss, rounds_values
from lissom.errors import InputError, UnsupportedError, VerifyError

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
    runs_ranks: True when it runs a program partitioned for several ranks.
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
    """Run what a backend built from a program beside it: on the example, at other sizes, and at the smallest, twice each.

    State is compared too, and put back to what it was.

    allowed: the relative error it may show, where that is more than two correct programs may. Returns the one it shows.

    Raises: VerifyError when it does not run, gives something else, or hands out memory that is not the caller's.
    """
    given = [*check_samples(program.signature, example), *smallest_samples(program, example)]
    samples, wanted, _ = run_original(program, given)
    if rounds_values(program):
        allowed = max(allowed, SHARE * rounding_loss(program, samples, wanted))
    worst = 0.0
    for sample, outputs in zip(samples, wanted, strict=True):
        subject, inputs = f"what backend '{name}' built from {program.name}", f"on inputs {shapes_of(sample)}"
        try:
            first, again = (_call(executable, sample) for _ in range(2))
        # The errors of other compilers and runtimes have no common class.
        except Exception as error:
            raise VerifyError(
                f"{subject} does not run {inputs}: {type(error).__name__}: {error}; choose another backend"
            ) from error
        exact = None
        for found in (first, again):
            errors = output_errors([outputs], [found])
            worst = max(worst, *errors, 0.0)
            limits = [max(limit, allowed) for limit in tolerances(program)]
            over = [(error, limit) for error, limit in zip(errors, limits, strict=True) if error > limit]
            exact = exact or (exact_outputs(program, [sample]) if over else None)
            if over and (exact is None or not exact.as_close([outputs], [found])):
                error, limit = over[0]
                raise VerifyError(
                    f"{subject} differs from the program by {error:.2g} relative {inputs}, allowed {limit:.2g}; "
                    f"choose another backend"
                )
        usual = shared_memory(program, sample, outputs)
        same = {(index, EARLIER) for index, _ in usual}  # an input or a weight, which is there in every call
        for index, other in sorted(shared_memory(program, sample, again, first) - usual - same)[:1]:
            raise VerifyError(f"{subject} gives an output {index} that shares memory with {other}; choose another backend")
    return worst


def _call(executable: Executable, sample: Sample) -> list[object]:
    """The outputs of one call, and the state it leaves, which is put back."""
    with restored_state(executable):
        return [*executable(sample), *(tensor.clone() for tensor in state_of(executable).values())]


def smallest_samples(program: Program, example: Sample) -> list[Sample]:
    """The example at the smallest sizes the signature promises, where compilers go wrong; none when it refuses them."""
    signature = program.signature
    sample = resize(signature, example, {symbol: dimension.minimum for symbol, dimension in signature.dimensions.items()})
    try:
        signature.check_sizes(sample)
    except InputError:
        return []
    return [sample]
