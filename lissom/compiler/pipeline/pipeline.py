"""The only place that runs passes: in their order, with a judge of what they gain, and once for several endings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from lissom.compiler.ir.collectives import alone
from lissom.compiler.ir.program import Program
from lissom.compiler.memory import free_dropped_programs, heap_set_aside
from lissom.compiler.pipeline.history import History, stopped_with
from lissom.compiler.pipeline.options import Progress
from lissom.compiler.pipeline.pass_kinds import Annotation, Approximation, Pass, Rewrite, Training
from lissom.compiler.pipeline.run import Run, RunOptions
from lissom.compiler.pipeline.spelling import format_pass, format_pipeline
from lissom.errors import LissomError


@dataclass(frozen=True)
class Verdict:
    """The verdict on a lossy pass: the measured figures, as a sentence, and whether to keep the pass."""

    figures: str
    keep: bool


class Judge(Protocol):
    """Compares programs as backends run them.

    Attributes:
        lowerings: the lowering passes of each backend.
    """

    @property
    def lowerings(self) -> Mapping[str, Sequence[Pass]]: ...

    def __call__(self, before: Mapping[str, Program], after: Mapping[str, Program]) -> Verdict | None:
        """The verdict on what came between two programs, each lowered for every backend; None where nothing can be measured."""
        ...


@dataclass(frozen=True)
class Pipeline(RunOptions):
    """Passes to run in the given order, and how to check each.

    Attributes:
        progress: called before each pass with its text, its number and the count.
        judge: called for each approximation that cheapens the program, with the program before it, and the program after it and
            all passes up to the next such approximation; its figures become a note, or the reason why the approximation is
            reverted.
    """

    progress: Progress | None = None
    judge: Judge | None = None

    def run(self, program: Program, history: History | None = None) -> tuple[Program, History]:
        """The program after all passes, and the history; the given program is not changed.

        A given history holds the record of the capture; the passes are recorded after it.

        Raises:
            LissomError: RequirementError, PassError, VerifyError or BudgetError of a pass, with the history so far.
            Interrupted: on Ctrl-C, likewise.
        """
        run = self._run(program, history, len(self.passes))
        _check_stretch(run)
        return run.program, run.history

    def run_each(
        self, program: Program, endings: Mapping[str, Sequence[Pass]], history: History | None = None
    ) -> dict[str, tuple[Program, History] | LissomError]:
        """Run the passes once, then each ending separately; for each the result of `run`, or the error that stopped it.
        Errors of the passes before the endings are raised, as by `run`.
        """
        count = len(self.passes) + sum(map(len, endings.values()))
        run = self._run(program, history, count)
        free_dropped_programs(run.program.parameter_bytes)  # those that a verdict was for
        finished, results = len(self.passes), dict[str, tuple[Program, History] | LissomError]()
        if len(endings) > 1:
            _check_stretch(run)
        for name, ending in endings.items():
            branch = run.branch(format_pipeline([*self.passes, *ending]))
            try:
                if name in run.lowered and self.judge is not None and self.judge.lowerings[name] is ending:
                    branch.go_on(run.lowered[name])
                else:
                    self._steps(branch, ending, finished, count)
                _check_stretch(branch)
                results[name] = branch.program, branch.history
            except LissomError as error:
                results[name] = error
            finished += len(ending)
        return results

    def _run(self, program: Program, history: History | None, count: int) -> Run:
        """The state of the run after all passes."""
        history = history or History(format_pipeline(self.passes), self.checks)
        with alone(), stopped_with(history):
            run = Run(self, program, history)
        self._steps(run, self.passes, 0, count)
        return run

    def _steps(self, run: Run, passes: Sequence[Pass], finished: int, count: int) -> None:
        with alone(), heap_set_aside(), stopped_with(run.history):
            trial: _Trial | None = None
            for index, pass_ in enumerate(passes, finished):
                show = partial(self._show, format_pass(pass_), index, count)
                if self.judge is not None and isinstance(pass_, Approximation) and pass_.cheapens:
                    self._judge(run, trial)
                    run.check_stretch()
                    trial = _Trial(pass_, copy(run), len(run.history.steps))
                elif isinstance(pass_, Training):
                    # Judged before it is trained: minutes of training make nothing faster.
                    reverted, trial = self._judge(run, trial), None
                    if reverted is not None and run.reference is None:
                        run.record_reverted(pass_, 0.0, _follows(reverted))
                        continue
                elif trial is not None:
                    trial.following.append((pass_, show))
                show()
                run.step(pass_, show)
            self._judge(run, trial)

    def _judge(self, run: Run, trial: _Trial | None) -> Pass | None:
        """Note what an approximation gained, or revert it and the lossy passes after it; exact passes run again.

        Returns the pass that was reverted.
        """
        if trial is None or self.judge is None:
            return None
        before, after = (_lowered(state, self.judge.lowerings) for state in (trial.start, run))
        verdict = None if before is None or after is None else self.judge(before, after)
        if verdict is None:
            return None
        steps = run.history.steps
        if verdict.keep:
            steps[trial.steps] = replace(steps[trial.steps], notes=(*steps[trial.steps].notes, verdict.figures))
            return None
        seconds = sum(step.seconds + step.check_seconds for step in steps[trial.steps :])
        run.go_back(trial.start, trial.steps)
        run.record_reverted(trial.pass_, seconds, verdict.figures)
        for pass_, show in trial.following:
            if isinstance(pass_, (Rewrite, Annotation)):
                show()
                run.step(pass_, show)
            else:
                run.record_reverted(pass_, 0.0, _follows(trial.pass_))
        return trial.pass_

    def _show(self, spelling: str, index: int, count: int, what: str = "", finished: int = 0, total: int = 0) -> None:
        """Report the running pass, and its current step if it reports one."""
        if self.progress is not None:
            self.progress(f"{spelling}: {what}, {finished} of {total}" if what else spelling, index, count)


def _lowered(run: Run, lowerings: Mapping[str, Sequence[Pass]]) -> dict[str, Program] | None:
    """The program as each backend runs it, which the run keeps for its result; None where a backend cannot lower it.

    The errors of lowering are raised when the result is lowered.
    """
    for name, lowering in lowerings.items():
        if name not in run.lowered:
            branch = run.branch(run.history.pipeline)
            try:
                for pass_ in lowering:
                    branch.step(pass_)
            except LissomError:
                return None
            run.lowered[name] = branch
    return {name: run.lowered[name].program for name in lowerings}


def _check_stretch(run: Run) -> None:
    with alone(), stopped_with(run.history):
        run.check_stretch()


def _follows(reverted: Pass) -> str:
    return f"it follows {format_pass(reverted)}, which was reverted"


@dataclass
class _Trial:
    """An approximation that is not judged yet.

    Attributes:
        start: the run before it.
        steps: the length of the history then.
        following: the passes after it that are judged with it.
    """

    pass_: Pass
    start: Run
    steps: int
    following: list[tuple[Pass, Callable[..., None]]] = field(default_factory=list["tuple[Pass, Callable[..., None]]"])
