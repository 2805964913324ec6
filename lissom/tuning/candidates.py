"""The candidates of a search: what was predicted of each, what was measured, and which is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import LissomError
from lissom.passes import RECIPES, known_passes
from lissom.tuning.spelling import EXACT
from lissom.tuning.store import Record, number, text

ALIKE = 1.02
"""Times that differ by less count as equal: two measurements of the same program do."""


@dataclass(frozen=True)
class Candidate:
    """A program that was built, timed and evaluated, or failed.

    Attributes:
        pipeline: its passes as text.
        backend: its name.
        milliseconds: of a call, with low and high quartile.
        bytes: of its weights.
        drop: of the metric, or the relative output error without a metric.
        error: the relative output error.
        predicted_cost: by the tables, in milliseconds or bytes, before it was built; None where they gave none.
        predicted_drop: the drop by the tables; None where they gave none.
        table_cost: the sum of the tables of costs itself, to which whole programs are fitted.
        table_loss: that of the tables of losses.
        table_amounts: the part of table_loss that fewer heads or neurons have.
        table_tables: that of formats of embedding tables and LM heads.
        failed: why it could not be built or measured; empty otherwise.

    Examples:
        >>> from lissom.tuning.candidates import Candidate
        >>> small = Candidate("prune-heads{keep=0.5},distill{steps=100}", "eager", milliseconds=4.5, bytes=2_000_000, drop=0.01)
        >>> small.exact, small.distilled, small.cost(memory=True)
        (False, True, 2000000.0)
    """

    pipeline: str
    backend: str
    milliseconds: float = 0.0
    low: float = 0.0
    high: float = 0.0
    bytes: int = 0
    drop: float = 0.0
    error: float = 0.0
    predicted_cost: float | None = None
    predicted_drop: float | None = None
    table_cost: float | None = None
    table_loss: float | None = None
    table_amounts: float = 0.0
    table_tables: float = 0.0
    failed: str = ""

    @property
    def exact(self) -> bool:
        """True if it is the program without lossy passes."""
        return self.pipeline == EXACT

    @property
    def distilled(self) -> bool:
        """True if it was trained."""
        return "distill" in self.pipeline

    def same(self, other: Candidate) -> bool:
        """True if both are the same program."""
        return (self.pipeline, self.backend) == (other.pipeline, other.backend)

    def cost(self, memory: bool) -> float:
        """Bytes or milliseconds."""
        return float(self.bytes) if memory else self.milliseconds


def read_candidate(record: Record) -> Candidate | None:
    """The candidate of a record; None if a number or the pipeline is not valid."""
    pipeline, backend, failed = text(record, "pipeline"), text(record, "backend"), text(record, "failed")
    try:
        parse_pipeline(pipeline, known_passes(), RECIPES)
    except (LissomError, RecursionError):
        return None
    figures = {name: number(record, name, 0.0) for name in ("milliseconds", "low", "high", "bytes", "error")}
    drop = number(record, "drop")
    if not pipeline or not backend or drop is None or any(figure is None for figure in figures.values()):
        return None
    known = {name: figure or 0.0 for name, figure in figures.items()}
    return Candidate(
        pipeline,
        backend,
        known["milliseconds"],
        known["low"],
        known["high"],
        int(known["bytes"]),
        drop,
        known["error"],
        number(record, "predicted_cost", 0.0),
        number(record, "predicted_drop"),
        number(record, "table_cost", 0.0),
        number(record, "table_loss", 0.0),
        number(record, "table_amounts", 0.0) or 0.0,
        number(record, "table_tables", 0.0) or 0.0,
        failed,
    )


@dataclass(frozen=True)
class Aim:
    """The objective of the search, and its bound.

    Attributes:
        memory: the cost is bytes, otherwise milliseconds.
        max_drop: the bound on the drop.
        target: the bound on the cost, with which the most accurate program is sought, whatever its drop; None for the cheapest
            program within `max_drop`.
    """

    memory: bool
    max_drop: float
    target: float | None = None

    def meets(self, candidate: Candidate) -> bool:
        """True if the candidate meets the bound."""
        if candidate.failed:
            return False
        if self.target is not None:
            return candidate.cost(self.memory) <= self.target
        return candidate.drop <= self.max_drop

    def rank(self, candidate: Candidate) -> tuple[float, float]:
        """Smaller is better, among candidates that meet the bound."""
        cost, drop = candidate.cost(self.memory), candidate.drop
        return (cost, drop) if self.target is None else (drop, cost)

    def miss(self, candidate: Candidate) -> float:
        """By which factor a candidate misses the bound."""
        figure, bound = (candidate.drop, self.max_drop) if self.target is None else (candidate.cost(self.memory), self.target)
        return figure / bound if bound > 0 else figure

    def choose(self, candidates: Sequence[Candidate]) -> Candidate:
        """The best candidate that meets the bound; without one, the exact program, which is the first.

        Of programs that are as fast as the fastest, within what a measurement varies, it is the one with the smallest drop.
        """
        fitting = [candidate for candidate in candidates if self.meets(candidate)]
        if not fitting:
            return candidates[0]
        best = min(fitting, key=self.rank)
        if self.memory or self.target is not None:
            return best
        alike = (candidate for candidate in fitting if candidate.milliseconds <= ALIKE * best.milliseconds)
        return min(alike, key=lambda candidate: (candidate.drop, candidate.milliseconds))

    def nearest_miss(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """The measured candidate that misses the bound by least; None if there is none besides the exact program."""
        missing = [
            candidate for candidate in candidates if not candidate.failed and not candidate.exact and not self.meets(candidate)
        ]
        return min(missing, key=self.miss, default=None)

    def frontier(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates that no other one matches in both cost and drop, the cheapest first."""
        frontier: list[Candidate] = []
        for candidate in sorted(
            (candidate for candidate in candidates if not candidate.failed),
            key=lambda candidate: (candidate.cost(self.memory), candidate.drop),
        ):
            if not frontier or candidate.drop < frontier[-1].drop:
                frontier.append(candidate)
        return frontier
