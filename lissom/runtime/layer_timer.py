"""Times the layers of a compiled program when a report asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lissom.backends.base import Backend, Executable
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.inspect.hot_layers import LayerTimes
from lissom.inspect.machine import load_machine
from lissom.ops.native.choice import is_measured

_SECONDS = 0.5


@dataclass
class ProgramTimer:
    """Times the layers of a lowered program, and keeps what it measured last.

    example: flat inputs; None for a loaded program, which has none. known: the last times; None before the first.
    """

    program: Program
    executable: Executable
    backend: Backend
    history: History
    example: Sample | None = None
    known: LayerTimes | None = None

    def measure(self, args: Sequence[object], kwargs: Mapping[str, object]) -> LayerTimes:
        """The times on these arguments of the model, or on the example without any.

        Raises: InputError if the arguments do not fit; UnsupportedError if there are no inputs, or if the backend does not run
            the layers one by one.
        """
        given = bool(args or kwargs) or not self.program.placeholders
        sample = self.program.signature.flatten(args, kwargs) if given else self.example
        if sample is None:
            raise UnsupportedError(
                f"{self.program.name} was loaded, and an artifact keeps no inputs to time its layers on; "
                f"give the arguments of a call: report.kernels(...)"
            )
        reasons = (skip for step in self.history.steps for skip in step.skipped)
        measured = {skip.node for skip in reasons if is_measured(skip.reason)}
        self.known = self.backend.time_layers(
            self.program, self.executable, sample, seconds=_SECONDS, machine=load_machine(), measured=measured
        )
        return self.known
