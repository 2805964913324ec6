"""The candidates of a search as they are built and measured, and as the store keeps them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from lissom.errors import InputError, LissomError
from lissom.runtime.compiled_model import CompiledModel
from lissom.tuning.build import Quality, Variant, Workshop
from lissom.tuning.candidates import Aim, Candidate, read_candidate
from lissom.tuning.clock import Clock
from lissom.tuning.store import Store, number


@dataclass
class Trials:
    """The measured candidates.

    Attributes:
        key: of the store, for the program, the machine, the inputs, the data and the metric.
        candidates: the exact program first, with its figures.
        distill: whether programs may be trained.
        best: the best candidate with its compiled program, where that is in memory.
        pace: the mean seconds of a candidate so far.
    """

    workshop: Workshop
    quality: Quality
    aim: Aim
    store: Store
    key: str
    clock: Clock
    candidates: list[Candidate]
    distill: bool = True
    best: tuple[Candidate, CompiledModel] | None = None
    pace: float = 0.0
    _built: int = 0

    @property
    def exact(self) -> Candidate:
        return self.candidates[0]

    def recall(self) -> None:
        """Take the candidates of earlier calls from the store, if this call may have them.

        A failure is not taken: it may have been the machine's. Their times are relative to the exact program's of their call.
        """
        for record in self.store.all("candidate", self.key):
            candidate = read_candidate(record)
            if candidate is None or candidate.failed or self.known(candidate) is not None:
                continue
            if candidate.backend in self.workshop.backends and (self.distill or not candidate.distilled):
                scale = self.exact.milliseconds / (number(record, "exact", 0.0) or self.exact.milliseconds)
                times = {name: scale * getattr(candidate, name) for name in ("milliseconds", "low", "high")}
                self.candidates.append(replace(candidate, **times))

    def known(self, candidate: Candidate) -> Candidate | None:
        """The candidate with the same passes and backend."""
        return next((known for known in self.candidates if known.same(candidate)), None)

    def measure(self, candidate: Candidate) -> Candidate:
        """The candidate with its figures, built and measured unless it is known; a failure is recorded with its reason.

        Raises:
            InputError: if the metric fails, as it would with the next candidate.
        """
        known = self.known(candidate)
        if known is not None:
            return known
        started, compiled = time.monotonic(), None
        self.clock.show(f"candidate {len(self.candidates)}")
        try:
            compiled = self.workshop.build(candidate.pipeline, candidate.backend)
            measured = self._with_figures(candidate, compiled)
        except InputError:
            raise
        except LissomError as error:
            measured = _failed(candidate, error)
        self._built += 1
        self.pace += (time.monotonic() - started - self.pace) / self._built
        self.candidates.append(measured)
        figures = asdict(measured) | {"exact": self.exact.milliseconds}
        self.store.add("candidate", self.key, f"{measured.backend} {measured.pipeline}", **figures)
        if compiled is not None and self.aim.choose(self.candidates) is measured:
            self.best = measured, compiled
            self.clock.best = self._words(measured)
        return measured

    def fail(self, candidate: Candidate, error: LissomError) -> None:
        """Record a candidate that cannot be built."""
        self.candidates.append(_failed(candidate, error))

    def _with_figures(self, candidate: Candidate, compiled: CompiledModel) -> Candidate:
        # Beside the best so far where there is one: on a machine whose memory is faster at times, a ratio of two programs that
        # are much alike varies less, and it is this one that decides.
        first, base = self.best or (self.exact, self.workshop.base(Variant(self.exact.backend)))
        timed = self.workshop.time(compiled, base, careful=not self.aim.memory)
        drop, squared = self.quality.drop(compiled)
        if not math.isfinite(drop + squared):
            return replace(candidate, failed="its outputs are not finite")
        return replace(
            candidate,
            milliseconds=timed.ratio * first.milliseconds,
            low=timed.low * first.milliseconds,
            high=timed.high * first.milliseconds,
            bytes=self.workshop.size(compiled),
            drop=drop,
            error=squared**0.5,
        )

    def chosen(self) -> tuple[Candidate, CompiledModel]:
        """The best candidate, compiled; one that the store knew is built and evaluated again."""
        while (best := self.aim.choose(self.candidates)) is not self.exact:
            if self.best is not None and self.best[0] is best:
                return self.best
            self.clock.show("the best candidate")
            again = replace(best, failed="the store had other figures for it")
            try:
                compiled = self.workshop.build(best.pipeline, best.backend)
                drop, squared = self.quality.drop(compiled)
                if self.aim.meets(replace(best, drop=drop, error=squared**0.5, bytes=self.workshop.size(compiled))):
                    return best, compiled
            except LissomError as error:
                again = _failed(best, error)
            self.candidates[self.candidates.index(best)] = again
        return best, self.workshop.base(Variant(best.backend))

    def fitting(self) -> Sequence[Candidate]:
        """The candidates that show how far the tables are off."""
        return [
            candidate
            for candidate in self.candidates
            if not candidate.failed and candidate.table_loss is not None and not candidate.distilled
        ]

    def _words(self, candidate: Candidate) -> str:
        memory = self.aim.memory
        ratio = self.exact.cost(memory) / max(candidate.cost(memory), 1e-9)
        return f"{ratio:.2f} x {'smaller' if memory else 'faster'}, drop {candidate.drop:.2g}"


def _failed(candidate: Candidate, error: LissomError) -> Candidate:
    """The candidate with the first line of the error as the reason."""
    return replace(candidate, failed=f"{type(error).__name__}: {error}".partition("\n")[0])
