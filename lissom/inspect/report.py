"""Compile reports: what every pass did, and the kernels of the hot layers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Protocol

from rich.console import Group, RenderableType
from rich.text import Text
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History, node_facts
from lissom.compiler.pipeline.options import NUMERIC
from lissom.errors import UnsupportedError
from lissom.inspect.hot_layers import LayerTimes
from lissom.inspect.html.data import page_data
from lissom.inspect.html.page import page
from lissom.inspect.node_errors import NodeErrors
from lissom.inspect.plots import Facts, plot
from lissom.inspect.step_texts import (
    Units,
    about_checks,
    changed_sizes,
    effect,
    hidden_steps,
    is_shown,
    notes_of,
    short_spelling,
)
from lissom.inspect.svg.heat import Heat, heat_of
from lissom.inspect.svg.step import step_svg
from lissom.inspect.tables import plain, plain_table
from lissom.io.files import check_path, write_whole
from lissom.measure.timing import Timing


class LayerTimer(Protocol):
    """Times the layers of a program.

    Attributes:
        known: the last times; None before the first.
        lengths: the times of calls by length.
    """

    program: Program
    known: LayerTimes | None
    lengths: Mapping[int, Timing]

    def measure(self, args: Sequence[object], kwargs: Mapping[str, object]) -> LayerTimes:
        """The times on these arguments of the model, or on its example without any."""
        ...

    def time_lengths(self, lengths: Sequence[int]) -> Mapping[int, Timing]:
        """The times of calls at these lengths."""
        ...


class ErrorMeter(Protocol):
    """Measures the errors of a program's nodes.

    Attributes:
        known: the last errors; None before the first.
    """

    known: NodeErrors | None

    def measure(self, model: object) -> NodeErrors:
        """The errors beside this model's nodes; None for the model that was compiled."""
        ...


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a compile: prints as a table, exports as JSON through `history`.

    The table lists the steps that changed something, and every lossy pass; `full()` lists every step, and the hot layers with
    their kernels, which are timed when it is printed first.

    Attributes:
        times_faster: the speedup over the original model at each shape that was timed; empty if nothing was timed.
        timer: times the layers of the compiled program; None for a program that is not lowered.
        meter: measures the errors of the program's nodes; None for a loaded model, and for one that ranks share.
        stopped: the error that ended the compile early; empty for one that finished.

    Examples:
        >>> import torch, lissom
        >>> report = lissom.optimize(torch.nn.Linear(4, 2), torch.randn(3, 4), passes="cast{dtype=bf16}").report
        >>> "40 → 20 B" in str(report)
        True
    """

    title: str
    history: History
    times_faster: tuple[float, ...] = ()
    every_step: bool = False
    timer: LayerTimer | None = None
    stopped: str = ""
    meter: ErrorMeter | None = None

    def full(self) -> Report:
        """This report with every step, and with the kernels of the hot layers."""
        return replace(self, every_step=True)

    def kernels(self, *args: object, **kwargs: object) -> LayerTimes:
        """The hot layers of the program with their kernels, timed now, in about a second.

        Args:
            args: the positional arguments of a call of the model; without any arguments, the example of the compile.
            kwargs: the keyword arguments.

        Raises:
            InputError: if they do not fit.
            UnsupportedError: if the program is not lowered or its backend runs no single layers, and for a loaded model without
                arguments.

        Examples:
            >>> import torch, lissom
            >>> fast = lissom.compile(torch.nn.Linear(256, 512), torch.randn(64, 256))
            >>> [layer.shape for layer in fast.report.kernels().hot]
            ['64 × 256 → 512']
        """
        return self._timed().measure(args, kwargs)

    def latency(self, lengths: Sequence[int] = (16, 32, 64, 128, 256, 512)) -> Mapping[int, Timing]:
        """The time of a call at several lengths, timed now; half a second each at most, or five calls.

        Args:
            lengths: of the dynamic dimensions besides the batch, or of the only one; others than the model takes are left out.

        Raises:
            UnsupportedError: if the program is not lowered, was loaded, has fixed sizes, or takes none of the lengths.
        """
        return self._timed().time_lengths(lengths)

    def errors(self, model: nn.Module | Program | None = None) -> NodeErrors:
        """The error of every node on the example inputs, and the softmax mass that sparse attentions keep.

        Measured now, against the original model: it is captured anew, and both programs run once, side by side. Pages and
        pictures of the report show it from then on.

        Args:
            model: what was compiled, with its weights unchanged; it may be left out as long as the caller holds it.

        Raises:
            InputError: for another model, or if the model is gone and not given.
            UnsupportedError: for a loaded model, and for one that ranks share.
        """
        if self.meter is None:
            raise UnsupportedError(
                f"{self.title} was loaded or runs on several ranks, so there is no original to compare it with; "
                f"compile the model here, in one process"
            )
        return self.meter.measure(model)

    @property
    def measured_errors(self) -> NodeErrors | None:
        """The last result of `errors`; None before the first call."""
        return None if self.meter is None else self.meter.known

    def _timed(self) -> LayerTimer:
        if self.timer is None:
            raise UnsupportedError(f"{self.title} is not lowered for a backend, so no kernels run it; use lissom.compile")
        return self.timer

    def plot(self, kind: str, path: str | PathLike[str]) -> None:
        """Draw a plot with matplotlib, in the format that the file's name says.

        Args:
            kind: `roofline`: the rate of every hot layer below the ceilings of the machine, after `kernels()`. `latency`: the
                time of a call over its length, after `latency()`. `quality`: metric, cosine or error after each lossy pass over
                the operations of a call. `training`: the losses of the training passes over their minutes.

        Raises:
            UnsupportedError: for another kind, for one that the report has no data for, without matplotlib, or for a format
                that matplotlib does not write.
            ArtifactError: if the file cannot be written.
        """
        times = None if self.timer is None else self.timer.known
        lengths: Mapping[int, Timing] = {} if self.timer is None else self.timer.lengths
        plot(kind, Facts(self.title, self.history, times, lengths), check_path(path))

    def to_html(self, path: str | PathLike[str], *, heat: str | None = None) -> None:
        """Write the report as one HTML file, which needs no network: the passes, and the program after each of them.

        The page has the times of layers and the errors of nodes if they were measured before (`kernels()`, `errors()`).

        Args:
            heat: what colors the nodes first, as for `to_svg`.

        Raises:
            UnsupportedError: for a heat that is not known.
            ArtifactError: if the file cannot be written.

        Examples:
            >>> import tempfile, torch, lissom
            >>> path = tempfile.mkdtemp() + "/report.html"
            >>> lissom.compile(torch.nn.Linear(4, 2), torch.ones(3, 4)).report.to_html(path)
        """
        times = None if self.timer is None else self.timer.known
        history = self.history
        last = len(history.steps) - 1
        if self.timer is not None and last not in history.changes:
            # Artifacts of earlier versions keep the facts of no step.
            history = replace(history, changes={**history.changes, last: {**node_facts(self.timer.program)}})
        if heat is not None:
            self._heat(heat, last)
        data = {"heat": heat} | page_data(self.title, history, times, self.measured_errors, _missing(self, times))
        write_whole(check_path(path), page(self.title, data, str(self)))

    def to_svg(
        self,
        path: str | PathLike[str] | None = None,
        *,
        step: int | None = None,
        only: str = "",
        compare: int | None = None,
        heat: str | None = None,
    ) -> str:
        """The program after a step as a picture: an SVG file that needs no network, in colors for light and dark.

        Modules are frames, nodes are boxes, identical layers are drawn once, with their number; modules for which there is no
        room are closed.

        Args:
            path: where to write it, if given.
            step: the last one by default.
            only: the path of a module, `encoder.layer.0`.
            compare: another step. If it is earlier, nodes that it lacks are marked as added; if it is later, as removed. Nodes
                that differ are marked as changed.
            heat: colors nodes by `flops`, `bytes`, `parameters`, `time` (after `kernels()`), `error` or `mass` (after
                `errors()`).

        Raises:
            UnsupportedError: if there is no such step, module or heat.
            ArtifactError: if the file cannot be written.

        Examples:
            >>> import torch, lissom
            >>> picture = lissom.optimize(torch.nn.Linear(4, 2), torch.ones(3, 4)).report.to_svg()
            >>> "linear" in picture
            True
        """
        last = len(self.history.steps) - 1
        colors = None if heat is None else self._heat(heat, last if step is None else step)
        picture = step_svg(self.title, self.history, step, only, compare, colors)
        if path is not None:
            write_whole(check_path(path), picture)
        return picture

    def _heat(self, kind: str, step: int) -> Heat:
        self.history.check_step(step)
        return heat_of(kind, self.history, step, None if self.timer is None else self.timer.known, self.measured_errors)

    def _repr_html_(self) -> str:
        """The report in a notebook: the table."""
        return f"<pre style='line-height: 1.2'>{html.escape(str(self))}</pre>"

    def __rich__(self) -> RenderableType:
        return _history_table(self)

    def __str__(self) -> str:
        return plain(_history_table(self))

    def __repr__(self) -> str:
        return f"<Report of {self.title}: {len(self.history.steps)} steps; print it to read them>"


def write_stopped(path: Path | None, title: str, history: History | None, reason: str) -> None:
    """Write the page of a compile that an error ended, as far as it went; nothing without a path or without a finished step.

    Raises:
        ArtifactError: if the file cannot be written.
    """
    if path is not None and history is not None and history.steps:
        Report(title, history, stopped=reason).to_html(path)


def _missing(report: Report, times: LayerTimes | None) -> list[str]:
    """Sentences on what the page of a report cannot show."""
    sentences = [f"The compile stopped after the last step shown: {report.stopped}"] if report.stopped else []
    if any(index not in report.history.changes for index in range(len(report.history.steps))):
        sentences.append(
            "Costs, source lines and passes of nodes are known for the last step alone: "
            "an artifact of an earlier version keeps no more."
        )
    if times is None and report.timer is not None:
        sentences.append("Times of layers: none were measured. Call report.kernels() before report.to_html().")
    elif times is None:
        sentences.append("Times of layers: the program is not lowered for a backend. Compile it with --backend to time it.")
    elif not times.nodes:
        sentences.append("Times of layers: this backend runs operators of its own, so the times cannot be put on nodes.")
    if report.measured_errors is None:
        sentences.append(
            "Errors of nodes: none were measured. Call report.errors() where the model is compiled, or use --errors."
        )
    if report.history.checks not in NUMERIC:
        sentences.append(f"Errors of steps: checks were {report.history.checks}, so outputs were not compared.")
    return sentences


def _history_table(report: Report) -> RenderableType:
    """A summary, a row per step, then the notes, the reasons for reverted passes, and the checks."""
    steps = report.history.steps
    before = dict(zip((step.index for step in steps[1:]), steps, strict=False))
    listed = [step for step in steps if report.every_step or is_shown(step, before.get(step.index), report.history.pipeline)]
    table = plain_table(f"{report.title}: {_summary(report)}\n")
    table.add_column("#", justify="right")
    table.add_column("pass", no_wrap=True)
    table.add_column("what it did", overflow="fold")
    scored = any(step.metric is not None for step in steps)
    units = Units.of(steps[0].size)
    headings = ("nodes", units.bytes.name, units.flops.name, "error", *(["metric"] if scored else []))
    for heading in (*(["s"] if report.every_step else []), *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in listed:
        row = [f"{step.seconds + step.check_seconds:.2f}"] if report.every_step else []
        row += changed_sizes(before.get(step.index), step, units)
        row += ["" if step.relative_error is None else f"{step.relative_error:.0e}"]
        row += [("" if step.metric is None else f"{step.metric:.4g}")] if scored else []
        table.add_row(str(step.index), Text(short_spelling(step.spelling)), Text(effect(step)), *row)
    below = [
        *notes_of(steps),
        *hidden_steps(len(steps) - len(listed)),
        *_summary_of_layers(report),
        about_checks(report.history),
    ]
    return Group(table, Text("\n".join(["", *below])), *_hot_layers(report))


def _summary_of_layers(report: Report) -> list[str]:
    """A line on the hot layers, if they were timed before."""
    known = None if report.timer is None or report.every_step else report.timer.known
    return [] if known is None else [known.summary]


def _hot_layers(report: Report) -> list[RenderableType]:
    """The table of a full report's hot layers, or why there is none; nothing for a program that is not lowered."""
    if report.timer is None or not report.every_step:
        return []
    try:
        return [Text(), report.timer.known or report.kernels()]
    except UnsupportedError as error:
        return [Text(f"kernels: {error}")]


def _summary(report: Report) -> str:
    """`2.1 × faster, 184 → 45 nodes, 90.9 → 23.1 MB, smallest cosine 0.9998`, as far as it is known."""
    first, last = report.history.steps[0], report.history.steps[-1]
    parts: list[str] = []
    if report.times_faster:
        low, high = (f"{speed:.1f}" for speed in (min(report.times_faster), max(report.times_faster)))
        parts.append(f"{low if low == high else f'{low} to {high}'} × faster")
    units = Units.of(first.size)
    (nodes, size, _), (nodes_before, size_before, _) = units.texts(last.size), units.texts(first.size)
    parts.append(f"{nodes} nodes" if nodes == nodes_before else f"{nodes_before} → {nodes} nodes")
    parts.append(f"{size if size == size_before else f'{size_before} → {size}'} {units.bytes.name}")
    lossy = [step for step in report.history.steps if not step.exact and step.reverted is None]
    if lossy and lossy[-1].relative_error is not None:
        error = f"largest error {lossy[-1].relative_error:.1e}"
        parts.append(error if last.cosine is None else f"smallest cosine {last.cosine:.4f}")
    elif not lossy and report.history.checks in NUMERIC:
        parts.append("equal outputs")
    if first.metric is not None and last.metric is not None:
        parts.append(f"metric {first.metric:.4g} → {last.metric:.4g}")
    return ", ".join(parts)
