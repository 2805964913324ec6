"""Times the layers of a compiled program when a report asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lissom.backends.base import Backend, Executable, restored_state
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.errors import UnsupportedError
from lissom.inspect.hot_layers import LayerTimes
from lissom.measure.choice import is_measured
from lissom.measure.machine import load_machine
from lissom.measure.timing import Timing, time_calls

_SECONDS = 0.5


@dataclass
class ProgramTimer:
    """Times the layers of a lowered program, and keeps what it measured last.

    Attributes:
        example: flat inputs; None for a loaded program, which has none.
        known: the last times; None before the first.
        lengths: the last times of calls, by their length.
    """

    program: Program
    executable: Executable
    backend: Backend
    history: History
    example: Sample | None = None
    known: LayerTimes | None = None
    lengths: Mapping[int, Timing] = field(default_factory=dict[int, Timing])

    def measure(self, args: Sequence[object], kwargs: Mapping[str, object]) -> LayerTimes:
        """The times on these arguments of the model, or on the example without any.

        Raises:
            InputError: if the arguments do not fit.
            UnsupportedError: if there are no inputs, or if the backend does not run the layers one by one.
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

    def time_lengths(self, lengths: Sequence[int]) -> Mapping[int, Timing]:
        """The times of calls at these lengths; those that the program does not take are left out.

        Raises:
            UnsupportedError: if the program was loaded, has fixed sizes, or takes none of them.
        """
        if self.example is None:
            raise UnsupportedError(f"{self.program.name} was loaded, and an artifact keeps no inputs to time; compile it anew")
        signature = self.program.signature
        if not signature.dimensions:
            raise UnsupportedError(
                f"all sizes of {self.program.name} are fixed, so it runs at one length; compile it with dynamic=True"
            )
        wanted = {length: dict.fromkeys(signature.lengths, length) for length in sorted(set(lengths))}
        samples = {length: signature.sample_at(self.example, sizes) for length, sizes in wanted.items()}
        calls = {str(length): partial(self.executable, sample) for length, sample in samples.items() if sample is not None}
        if not calls:
            raise UnsupportedError(f"{self.program.name} takes none of the lengths {', '.join(map(str, samples))}; give others")
        with restored_state(self.executable):
            timings = time_calls(calls, _SECONDS)
        self.lengths = {int(length): timing for length, timing in timings.items()}
        return self.lengths
