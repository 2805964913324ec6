"""The report of a search: the candidates as a table and as a picture, and what was chosen for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.text import Text

from lissom.compiler.pipeline.spelling import format_pass, parse_pipeline
from lissom.errors import UnsupportedError
from lissom.inspect.pictures import FAINT, MAIN, MARKED, QUIET, new_figure, save_figure
from lissom.inspect.tables import plain, plain_table
from lissom.io.files import check_path
from lissom.passes import RECIPES, known_passes
from lissom.tuning.candidates import ALIKE, Aim, Candidate
from lissom.tuning.sites import Group, Option
from lissom.tuning.spelling import EXACT, read_options

_LONGEST = 30
_CAST = "cast"


@dataclass(frozen=True, repr=False)
class TuneReport:
    """The candidates of a search; prints as a table.

    Attributes:
        name: of the program.
        candidates: the exact program first.
        scored: whether drops are those of a metric.
        notes: sentences.
        groups: of the program; empty for a report that was read from a store.

    Examples:
        >>> import torch, lissom
        >>> model, batches = torch.nn.Linear(16, 16).eval(), [torch.randn(2, 16) for _ in range(2)]
        >>> report = lissom.tune(model, batches[0], data=batches, goal="memory", minutes=0.05, distill=False).report
        >>> report.verdict(report.chosen)
        'chosen'
    """

    name: str
    aim: Aim
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    scored: bool
    notes: tuple[str, ...] = ()
    groups: tuple[Group, ...] = ()

    @property
    def frontier(self) -> list[Candidate]:
        """The candidates that no other matches in both cost and drop, the cheapest first."""
        return self.aim.frontier(self.candidates)

    def verdict(self, candidate: Candidate) -> str:
        """The reason a candidate was chosen or not, in words."""
        if candidate is self.chosen:
            return "chosen"
        if candidate.failed:
            return f"failed: {candidate.failed}"
        if not self.aim.meets(candidate):
            if self.aim.target is not None:
                return f"misses the target: {self._cost(candidate)} of {self._amount(self.aim.target)}"
            return f"loses {candidate.drop:.3g}, allowed {self.aim.max_drop:.3g}"
        ahead = self.chosen.drop if self.aim.target is not None else self.chosen.cost(self.aim.memory)
        own = candidate.drop if self.aim.target is not None else candidate.cost(self.aim.memory)
        factor = f"{own / ahead:.2f} x the {self._ranked}" if ahead > 0 else f"a larger {self._ranked}"
        text = f"{factor} of the chosen one" + (", with a larger drop" if own < ahead else "")
        return text + (", on the frontier" if candidate in self.frontier else "")

    def why_exact(self) -> str:
        """The reason the exact program was chosen: the nearest miss, or that nothing was found to be cheaper."""
        missed = self.aim.nearest_miss(self.candidates)
        kept = "the exact program is kept"
        if missed is not None:
            return f"no cheaper candidate meets the bound, and {kept}; the nearest {self.verdict(missed)}: {missed.pipeline}"
        if not self.groups:
            return f"{kept}: the model has no layer that the search can change"
        if all(candidate.exact or candidate.failed for candidate in self.candidates):
            return f"{kept}: no other was built within the time, or the tables show nothing that is cheaper"
        clearly = f" by more than {ALIKE - 1:.0%}" if self._ranked == "time" else ""
        return f"{kept}: no candidate has a smaller {self._ranked}{clearly}"

    @property
    def _ranked(self) -> str:
        return "drop" if self.aim.target is not None else "size" if self.aim.memory else "time"

    def _amount(self, cost: float) -> str:
        return f"{cost / 1e6:.3g} MB" if self.aim.memory else f"{cost:.3g} ms"

    def _cost(self, candidate: Candidate) -> str:
        return self._amount(candidate.cost(self.aim.memory))

    def layers(self) -> RenderableType:
        """The choice for each group: heads or neurons that stay, and the scheme or pattern."""
        table = plain_table("what was chosen for each layer\n")
        for heading in ("part", "kind", "stays", "", "form"):
            table.add_column(heading, justify="right" if heading == "stays" else "left", no_wrap=heading != "part")
        for group, option in zip(self.groups, read_options(self.groups, self.chosen.pipeline), strict=True):
            share = option.left / group.size
            table.add_row(Text(group.name), group.kind, _left(group, option), _bar(share), _form(group, option))
        return table

    def plot(self, kind: str, path: str | PathLike[str]) -> None:
        """Draw a plot with matplotlib, in the format that the file's name says.

        Args:
            kind: `pareto`: cost and drop of all candidates, the frontier as a line, candidates that others match in both in
                grey, quartiles of times as bars, the choice marked.

        Raises:
            UnsupportedError: for another kind, without matplotlib, or for a format that it does not write.
        """
        if kind != "pareto":
            raise UnsupportedError(f"the report of a search has no plot '{kind}'; it has pareto; tuned.best.report has others")
        _plot(self, check_path(path))

    def __rich__(self) -> RenderableType:
        return _table(self)

    def __str__(self) -> str:
        return plain(_table(self), 120)

    def __repr__(self) -> str:
        return f"<TuneReport of {self.name}: {len(self.candidates)} candidates; print it to read them>"


def _left(group: Group, option: Option) -> str:
    if not option.left:
        return "removed"
    return f"{option.left} of {group.size}" if group.units else "all"


def _form(group: Group, option: Option) -> str:
    pooled = f", {option.pooled} of {group.key_value_heads} key/value heads" if option.pooled else ""
    return f"{option.scheme}{pooled}" if option.left else ""


def _bar(share: float) -> str:
    return "█" * round(12 * share) + "░" * (12 - round(12 * share))


def _table(report: TuneReport) -> RenderableType:
    first, chosen, memory = report.candidates[0], report.chosen, report.aim.memory
    gain = first.cost(memory) / max(chosen.cost(memory), 1e-9)
    word = "smaller" if memory else "faster"
    table = plain_table(f"tune {report.name}: {gain:.2f} x {word}, drop {chosen.drop:.3g}\n")
    for heading in ("#", "predicted", "MB" if memory else "ms", "predicted", "drop", "ms" if memory else "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    table.add_column("passes", overflow="fold")
    order = sorted(range(len(report.candidates)), key=lambda at: report.candidates[at].cost(memory))
    for at in order:
        candidate = report.candidates[at]
        cost, other = (
            (candidate.bytes / 1e6, candidate.milliseconds) if memory else (candidate.milliseconds, candidate.bytes / 1e6)
        )
        predicted = None if candidate.predicted_cost is None else candidate.predicted_cost / (1e6 if memory else 1)
        figures = [f"{value:.3g}" for value in (cost, candidate.drop, other)] if not candidate.failed else [""] * 3
        table.add_row(
            str(at), _known(predicted), figures[0], _known(candidate.predicted_drop), figures[1], figures[2],
            Text(report.verdict(candidate)), Text(shortened(candidate.pipeline)),
        )  # fmt: skip
    drop = "drop of the metric" if report.scored else "relative output error"
    below = ["", f"drop: {drop}; predicted: by the tables, before the program was built", *map(_sentence, report.notes)]
    parts: list[RenderableType] = [table, Text("\n".join(below))]
    if report.groups and not chosen.exact:
        parts += [Text(), report.layers()]
    return Stack(*parts, Text(f"\nbackend {chosen.backend}, passes:\n{chosen.pipeline}"))


def _sentence(note: str) -> str:
    return f"- {note}"


def _known(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def shortened(pipeline: str) -> str:
    """The passes of a pipeline, with short options only."""
    cast = RECIPES["mixed-precision"]
    texts = (format_pass(pass_) for pass_ in parse_pipeline(pipeline.replace(cast, _CAST), known_passes(), RECIPES))
    short = [text if len(text) <= _LONGEST else f"{text.partition('{')[0]}{{…}}" for text in texts]
    return ", ".join("bf16" if text == _CAST else text for text in short) if pipeline != EXACT else EXACT


def _plot(report: TuneReport, path: Path) -> None:
    memory = report.aim.memory
    scale = 1e6 if memory else 1.0
    figure, (axes,) = new_figure()
    measured = [candidate for candidate in report.candidates if not candidate.failed]
    frontier = report.frontier
    for group, colour, label in (
        ([candidate for candidate in measured if candidate not in frontier], FAINT, "matched by others"),
        (frontier, MAIN, "frontier"),
    ):
        if not group:
            continue
        x = [candidate.cost(memory) / scale for candidate in group]
        errors = None if memory else [
            [max(candidate.milliseconds - candidate.low, 0.0) for candidate in group],
            [max(candidate.high - candidate.milliseconds, 0.0) for candidate in group],
        ]  # fmt: skip
        style = "o-" if group is frontier else "o"
        axes.errorbar(x, [candidate.drop for candidate in group], xerr=errors, fmt=style, color=colour, label=label, capsize=2)
    chosen = report.chosen
    axes.plot([chosen.cost(memory) / scale], [chosen.drop], "*", color=MARKED, markersize=14, label="chosen", zorder=5)
    if report.aim.target is None:
        axes.axhline(report.aim.max_drop, color=QUIET, linestyle=":", label="max_drop")
    else:
        axes.axvline(report.aim.target / scale, color=QUIET, linestyle=":", label="target")
    axes.set(xlabel="MB" if memory else "ms", ylabel="drop of the metric" if report.scored else "relative output error")
    axes.set_title(report.name)
    axes.legend()
    save_figure(figure, path)
