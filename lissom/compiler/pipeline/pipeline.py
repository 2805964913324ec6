"""The only place that runs passes: requirements, run, drop dead nodes, verify, measure, record."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from lissom.compiler.ir import printer
from lissom.compiler.ir.collectives import alone
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, more_samples
from lissom.compiler.memory import heap_set_aside
from lissom.compiler.pipeline.history import History, Size, Step, changed_calls, stopped_with
from lissom.compiler.pipeline.options import Checks, Metric, Progress, check_options, read_score
from lissom.compiler.pipeline.pass_kinds import Annotation, Approximation, Pass, Rewrite, Training
from lissom.compiler.pipeline.spelling import format_pass, format_pipeline
from lissom.compiler.verify.divergence import answers, compare, run_original, run_samples
from lissom.compiler.verify.equality import changed_strides, require_equal
from lissom.compiler.verify.structure import require_kept_form, verify_structure
from lissom.errors import BudgetError, LissomError, PassError, RequirementError, UnsupportedError, VerifyError


@dataclass(frozen=True)
class Verdict:
    """The verdict on a lossy pass: the measured figures, as a sentence, and whether to keep the pass."""

    figures: str
    keep: bool


Judge = Callable[[Program, Program], Verdict | None]

CALIBRATED_TOKENS = 2**16
"""As many as 128 texts of 512. GPTQ of Gemma 3 270M reads them in 10 minutes, and loses 1.6 % where an eighth loses 4.3 %."""


@dataclass(frozen=True)
class Pipeline:
    """Passes to run in the given order, and how to check each.

    checks: `numeric` runs programs and compares outputs, `structural` checks form and types only, `off` nothing.
    samples: flat verification inputs for the numeric checks.
    data: flat calibration inputs for passes that need some. labels: of each of them, or None.
    metric: scores a program, higher is better; max_drop: the largest drop below the original's score that is allowed.
    progress: called before each pass with its text, its number and the count.
    judge: called for each approximation that cheapens the program, with the program before it, and the program after it and
        all passes up to the next such approximation; its figures become a note, or the reason why the approximation is
        reverted. None where nothing can be measured.
    """

    passes: Sequence[Pass]
    samples: Sequence[Sample] = ()
    checks: Checks = "numeric"
    data: Sequence[Sample] = ()
    labels: Sequence[torch.Tensor | None] = ()
    metric: Metric | None = None
    max_drop: float | None = None
    progress: Progress | None = None
    judge: Judge | None = None

    def __post_init__(self) -> None:
        check_options(self.checks, self.metric, self.max_drop)
        if self.checks == "numeric" and not self.samples:
            raise UnsupportedError("numeric checks need samples to run on; pass samples, or checks='structural'")

    def most_tokens(self, pass_: Pass) -> int | None:
        """The tokens of the data that a pass gets at most: data for training is more than the other passes need."""
        trains = any(isinstance(other, Training) for other in self.passes)
        return CALIBRATED_TOKENS if trains and not isinstance(pass_, Training) else None

    def run(self, program: Program, history: History | None = None) -> tuple[Program, History]:
        """The program after all passes, and the history; the given program is not changed.

        A given history holds the record of the capture; the passes are recorded after it.

        Raises: RequirementError, PassError, VerifyError, BudgetError, Interrupted; each holds the history so far.
        """
        run = self._run(program, history, len(self.passes))
        with alone(), stopped_with(run.history):
            run.check_stretch()
        return run.program, run.history

    def run_each(
        self, program: Program, endings: Mapping[str, Sequence[Pass]], history: History | None = None
    ) -> dict[str, tuple[Program, History] | LissomError]:
        """Run the passes once, then each ending separately; for each the result of `run`, or the error that stopped it.

        Raises: as `run`, when the passes before the endings fail.
        """
        count = len(self.passes) + sum(map(len, endings.values()))
        run = self._run(program, history, count)
        finished, results = len(self.passes), dict[str, tuple[Program, History] | LissomError]()
        for name, ending in endings.items():
            branch = run.branch(format_pipeline([*self.passes, *ending]))
            try:
                self._steps(branch, ending, finished, count)
                with alone(), stopped_with(branch.history):
                    branch.check_stretch()
                results[name] = branch.program, branch.history
            except LissomError as error:
                results[name] = error
            finished += len(ending)
        return results

    def _run(self, program: Program, history: History | None, count: int) -> _Run:
        """The state of the run after all passes."""
        history = history or History(format_pipeline(self.passes), self.checks)
        with alone(), stopped_with(history):
            run = _Run(self, program, history)
        self._steps(run, self.passes, 0, count)
        return run

    def _steps(self, run: _Run, passes: Sequence[Pass], finished: int, count: int) -> None:
        with alone(), heap_set_aside(), stopped_with(run.history):
            trial: _Trial | None = None
            for index, pass_ in enumerate(passes, finished):
                show = partial(self._show, format_pass(pass_), index, count)
                if self.judge is not None and isinstance(pass_, Approximation) and pass_.cheapens:
                    self._judge(run, trial)
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

    def _judge(self, run: _Run, trial: _Trial | None) -> Pass | None:
        """Note what an approximation gained, or revert it and the lossy passes after it; exact passes run again.

        Returns the pass that was reverted.
        """
        if trial is None or self.judge is None:
            return None
        verdict = self.judge(trial.start.program, run.program)
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


def _follows(reverted: Pass) -> str:
    return f"it follows {format_pass(reverted)}, which was reverted"


@dataclass
class _Trial:
    """An approximation that is not judged yet.

    start: the run before it. steps: the length of the history then. following: the passes after it that are judged with it.
    """

    pass_: Pass
    start: _Run
    steps: int
    following: list[tuple[Pass, Callable[..., None]]] = field(default_factory=list["tuple[Pass, Callable[..., None]]"])


@dataclass
class _Run:
    """The state of one run of a pipeline.

    program: the current program; outputs: its outputs on the samples. original: the outputs it is measured against.
    reference: the program before the first lossy pass. stretch: the exact passes since the program `start`.
    """

    pipeline: Pipeline
    program: Program
    history: History
    samples: list[Sample] = field(init=False)
    original: list[list[object]] = field(init=False)
    outputs: list[list[object]] = field(init=False)
    score: float | None = field(init=False, default=None)
    reference: Program | None = field(init=False, default=None)
    stretch: tuple[Pass, ...] = field(init=False, default=())
    start: Program = field(init=False)

    def __post_init__(self) -> None:
        samples = self.pipeline.samples if self.pipeline.checks == "numeric" else ()
        self.samples, self.outputs, notes = run_original(self.program, samples)
        self.start = self.program
        self.original = answers(self.program, self.outputs)
        self.score = self._measure(self.program)
        start = self.history.steps[0] if self.history.steps else Step(0, "capture", "capture", 0.0, 0.0, Size.of(self.program))
        self.history.restart(replace(start, metric=self.score, notes=(*start.notes, *notes)), self.program)

    def branch(self, pipeline: str) -> _Run:
        """A copy of the run with its own history; pipeline: the text of the whole pipeline of the branch."""
        branch = copy(self)
        kept = self.history
        branch.history = replace(kept, pipeline=pipeline, steps=[*kept.steps], texts=[*kept.texts], changes={**kept.changes})
        return branch

    def go_back(self, start: _Run, steps: int) -> None:
        """Restore the state `start`, whose history had that many steps."""
        del self.history.steps[steps:], self.history.texts[steps:]
        self.program, self.original, self.outputs = start.program, start.original, start.outputs
        self.reference, self.stretch, self.start = start.reference, start.stretch, start.start

    def record_reverted(self, pass_: Pass, seconds: float, reason: str) -> None:
        """Record a pass that ran and was reverted."""
        last, index = self.history.steps[-1], len(self.history.steps)
        spelling, size = format_pass(pass_), last.size
        score, about = last.metric, pass_.about()
        step = Step(index, spelling, pass_.kind, seconds, 0.0, size=size, metric=score, reverted=reason, about=about)
        self.history.record_program(step, self.program, self.program.text())

    def step(self, pass_: Pass, show: Callable[[str, int, int], None] | None = None) -> None:
        """Run one pass on a copy of the program; only a copy that passes its checks replaces the program."""
        for requirement in pass_.requires:
            if (node := requirement.breach(self.program)) is not None:
                raise RequirementError(requirement.sentence(self.program, pass_.name(), node))
        if not isinstance(pass_, (Rewrite, Annotation)):
            self.check_stretch()
        started = time.perf_counter()
        fixed = pass_.fixed(self.program) if isinstance(pass_, Training) else ()
        copied = self.program.own_copy(fixed) if isinstance(pass_, Training) else self.program.copy()
        data, labels, most = self.pipeline.data, self.pipeline.labels, self.pipeline.most_tokens(pass_)
        edit = Editor(copied, pass_.name(), data, labels=labels, most_tokens=most, reference=self.reference, progress=show)
        self._run_pass(pass_, edit, fixed)
        after = edit.program
        after.drop_dead()
        ran, text_after = time.perf_counter(), after.text()
        try:
            error, cosine, outputs = self._check(pass_, after, edit, text_after)
        except (VerifyError, *REFUSALS) as problem:
            what = "" if isinstance(problem, VerifyError) else f"the program does not run after it: {type(problem).__name__}: "
            raise VerifyError(f"{format_pass(pass_)} was rolled back: {what}{problem}") from problem
        metric = self._charge(pass_, after)
        added, removed = changed_calls([n.name for n in self.program.nodes()], [n.name for n in after.nodes()])
        step = Step(
            index=len(self.history.steps),
            spelling=format_pass(pass_),
            kind=pass_.kind,
            seconds=ran - started,
            check_seconds=time.perf_counter() - ran,
            size=Size.of(after),
            added=added,
            removed=removed,
            rewritten=edit.rewritten,
            skipped=tuple(edit.skipped),
            relative_error=error,
            cosine=cosine,
            metric=metric,
            notes=tuple(edit.notes),
            curve=tuple(edit.curve),
            per_site=edit.per_site,
            about=pass_.about(),
        )
        if not isinstance(pass_, (Rewrite, Annotation)):
            self.start, self.reference = after, self.reference or self.program
        elif outputs is not self.outputs and self.pipeline.checks == "numeric":
            self.stretch = (*self.stretch, pass_)
        self.program, self.outputs = after, outputs
        if pass_.redefines:
            self.original = answers(after, outputs)
        self.history.record_program(step, after, text_after)

    def _run_pass(self, pass_: Pass, edit: Editor, fixed: Collection[str]) -> None:
        # A run of the program writes its state, and restores it. A training pass has copies of all but the fixed weights.
        kept = [name for name in edit.program.weights() if name not in edit.program.state]
        kept = [name for name in kept if name in fixed] if isinstance(pass_, Training) else kept
        shared = {name: (tensor := edit.program.weight(name), _version(tensor)) for name in kept}
        try:
            pass_.run(edit)
        except LissomError:
            raise
        # Third-party passes and operators may raise anything; the error is kept as the cause.
        except Exception as error:
            where = f" at {printer.place(edit.program, edit.current)}" if edit.current else ""
            lines = f"\n{printer.excerpt(edit.program, edit.current)}" if edit.current else ""
            raise PassError(
                f"{format_pass(pass_)} failed{where}: {type(error).__name__}: {error}; "
                f"the program from before the pass is intact{lines}"
            ) from error
        if isinstance(pass_, Training):
            for weight in edit.program.weights().values():
                weight.requires_grad_(False).grad = None
        written = next((name for name, (tensor, version) in shared.items() if _version(tensor) != version), None)
        if written is not None:
            raise PassError(
                f"{format_pass(pass_)} wrote to the weight '{written}' in place, which the program shares with the model it "
                f"came from; the model's own weight is changed now: load it again, and use edit.set_weight in the pass"
            )

    def _check(
        self, pass_: Pass, after: Program, edit: Editor, text_after: str
    ) -> tuple[float | None, float | None, list[list[object]]]:
        """The error and cosine of the program after the pass, and its outputs; both None when nothing was run.

        A program without edits or training has the outputs of the program before it, and is not run again.
        """
        if self.pipeline.checks == "off":
            return None, None, []
        touched = after.edits > 0 or isinstance(pass_, Training) or text_after != self.history.texts[-1]
        if touched:
            verify_structure(after, self.program)
        if isinstance(pass_, Training):
            require_kept_form(self.program, after)
        if self.pipeline.checks == "structural":
            return None, None, []
        outputs = run_samples(after, self.samples) if touched else self.outputs
        divergence = compare(self.original, answers(after, outputs))
        if not isinstance(pass_, (Rewrite, Annotation)):
            return divergence.relative_error, divergence.cosine, outputs
        bitwise = isinstance(pass_, Annotation)
        error = require_equal(self.program, after, self.samples, self.outputs, outputs, bitwise) if touched else 0.0
        edit.notes += changed_strides(answers(self.program, self.outputs[:1])[0], answers(after, outputs[:1])[0])
        return error, divergence.cosine, outputs

    def check_stretch(self) -> None:
        """Compare the program with the one before the latest exact passes, on further verification inputs.

        Raises: VerifyError naming the pass that is wrong on one of them.
        """
        stretch, start, began = self.stretch, self.start, time.perf_counter()
        self.stretch, self.start = (), self.program
        if not stretch:
            return
        given = more_samples(start.signature, self.samples[0], self.history.steps[0].size.flops)
        samples, wanted, notes = run_original(start, [self.samples[0], *given])
        try:
            require_equal(start, self.program, samples, wanted, run_samples(self.program, samples))
        except (VerifyError, *REFUSALS):
            self._find_wrong(stretch, start, samples, wanted)
        first, last = self.history.steps[0], self.history.steps[-1]
        self.history.steps[-1] = replace(last, check_seconds=last.check_seconds + time.perf_counter() - began)
        fresh = [note for note in notes if note not in first.notes]
        self.history.steps[0] = replace(self.history.steps[0], notes=(*first.notes, *fresh))

    def _find_wrong(self, stretch: Sequence[Pass], start: Program, samples: list[Sample], wanted: list[list[object]]) -> None:
        """Run exact passes again, each checked on all inputs; rounding errors may add up although no pass is wrong.

        Raises: VerifyError.
        """
        again = copy(self)
        again.history = History(self.history.pipeline, self.history.checks, self.history.steps[:1], [start.text()])
        again.program, again.samples, again.outputs, again.original = start, samples, wanted, answers(start, wanted)
        for pass_ in stretch:
            again.step(pass_)

    def _charge(self, pass_: Pass, after: Program) -> float | None:
        """The metric of the program, measured after every pass that may change it; checked against the budget."""
        if isinstance(pass_, (Rewrite, Annotation)):
            return self.history.steps[-1].metric
        score, allowed = self._measure(after), self.pipeline.max_drop
        if score is None or self.score is None or allowed is None:
            return score
        drop = self.score - score
        if not drop <= allowed:
            raise BudgetError(
                f"{format_pass(pass_)} was rolled back: it takes the metric from {self.score:.4g} to {score:.4g}, "
                f"a drop of {drop:.4g}, allowed {allowed:.4g}; make the pass milder or raise max_drop"
            )
        return score

    def _measure(self, program: Program) -> float | None:
        if self.pipeline.metric is None:
            return None
        with torch.no_grad(), kept_state(program):
            return read_score(self.pipeline.metric(program), original=self.score is None)


def _version(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor; 0 for tensors created in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
