"""The state of one run of a pipeline: a pass at a time is run on a copy, checked, measured and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch

from lissom.compiler.ir import printer
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import LARGE_WORK, Sample, more_samples
from lissom.compiler.pipeline.history import History, Size, Step, changed_calls
from lissom.compiler.pipeline.options import NUMERIC, Checks, Metric, check_options, read_score
from lissom.compiler.pipeline.pass_kinds import Annotation, Pass, Rewrite, Training
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.verify.divergence import answers, compare, output_errors, run_original, run_samples
from lissom.compiler.verify.equality import changed_strides, require_equal
from lissom.compiler.verify.structure import require_kept_form, verify_structure
from lissom.errors import BudgetError, LissomError, PassError, RequirementError, UnsupportedError, VerifyError

CALIBRATED_TOKENS = 2**16
"""As many as 128 texts of 512. GPTQ of Gemma 3 270M reads them in 10 minutes, and loses 1.6 % where an eighth loses 4.3 %."""


@dataclass(frozen=True)
class RunOptions:
    """Passes to run in the given order, and how to check each.

    Attributes:
        checks: `numeric` runs programs and compares outputs, once for all exact passes in a row, and one by one where they
            differ; `each` compares after every pass. `structural` checks form and types only, `off` nothing.
        samples: flat verification inputs for the numeric checks.
        data: flat calibration inputs for passes that need some.
        labels: of each of them, or None.
        metric: scores a program, higher is better.
        max_drop: the largest drop below the original's score that is allowed.
    """

    passes: Sequence[Pass]
    samples: Sequence[Sample] = ()
    checks: Checks = "numeric"
    data: Sequence[Sample] = ()
    labels: Sequence[torch.Tensor | None] = ()
    metric: Metric | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        check_options(self.checks, self.metric, self.max_drop)
        if self.checks in NUMERIC and not self.samples:
            raise UnsupportedError(f"checks={self.checks!r} needs samples to run on; pass samples, or checks='structural'")

    def most_tokens(self, pass_: Pass) -> int | None:
        """The tokens of the data that a pass gets at most: data for training is more than the other passes need."""
        trains = any(isinstance(other, Training) for other in self.passes)
        return CALIBRATED_TOKENS if trains and not isinstance(pass_, Training) else None


@dataclass
class Run:
    """The state of one run of a pipeline.

    Attributes:
        program: the current program.
        original: the outputs it is measured against.
        reference: the program before the first lossy pass.
        stretch: the exact passes since the program `start`, with the indices of their steps.
        outputs: of the last program that was run on the samples, `start` unless every pass is checked.
        branched: the number of steps at which it left another run.
        lowered: branches of this program that were lowered for a backend, by its name.
        spare: a program, and a copy of it that a pass left as it was, which the next pass may edit; of all copies of the run.
    """

    options: RunOptions
    program: Program
    history: History
    samples: list[Sample] = field(init=False)
    original: list[list[object]] = field(init=False)
    outputs: list[list[object]] = field(init=False)
    score: float | None = field(init=False, default=None)
    reference: Program | None = field(init=False, default=None)
    stretch: tuple[tuple[int, Pass], ...] = field(init=False, default=())
    start: Program = field(init=False)
    branched: int = field(init=False, default=0)
    lowered: dict[str, Run] = field(init=False, default_factory=dict[str, "Run"])
    spare: list[tuple[Program, Program]] = field(init=False, default_factory=list[tuple[Program, Program]])

    def __post_init__(self) -> None:
        samples = self.options.samples if self.options.checks in NUMERIC else ()
        self.samples, self.outputs, notes = run_original(self.program, samples)
        self.start = self.program
        self.original = answers(self.program, self.outputs)
        self.score = self._measure(self.program)
        start = self.history.steps[0] if self.history.steps else Step(0, "capture", "capture", 0.0, 0.0, Size.of(self.program))
        self.history.restart(replace(start, metric=self.score, notes=(*start.notes, *notes)), self.program)

    def branch(self, pipeline: str) -> Run:
        """A copy of the run with its own history.

        Args:
            pipeline: the text of the whole pipeline of the branch.
        """
        other, kept = copy(self), self.history
        other.branched, other.lowered = len(kept.steps), {}
        other.history = replace(kept, pipeline=pipeline, steps=[*kept.steps], texts=[*kept.texts], changes={**kept.changes})
        return other

    def go_on(self, branch: Run) -> None:
        """Take over the steps of a branch of this program, although steps without effect may have been recorded since."""
        later, shift = range(branch.branched, len(branch.history.steps)), len(self.history.steps) - branch.branched
        for index in later:
            step = replace(branch.history.steps[index], index=index + shift)
            self.history.record(step, branch.history.texts[index], branch.history.facts_of(index))
        self.stretch += tuple((index + shift, pass_) for index, pass_ in branch.stretch if index >= branch.branched)
        self.program = branch.program
        if self.options.checks == "each":
            self.outputs = branch.outputs

    def go_back(self, start: Run, steps: int) -> None:
        """Restore the state `start`, whose history had that many steps."""
        self.history.cut(steps)
        self.program, self.original, self.outputs = start.program, start.original, start.outputs
        self.reference, self.stretch, self.start, self.lowered = start.reference, start.stretch, start.start, start.lowered

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
        if not isinstance(pass_, Rewrite):
            self.check_stretch()
        started = time.perf_counter()
        edit, copied = self._edited(pass_, show)
        after = edit.program
        ran, text_after = time.perf_counter(), after.text()
        # A program without edits or training has the outputs of the program before it, and is not run again.
        touched = after.edits > 0 or isinstance(pass_, Training) or text_after != self.history.texts[-1]
        try:
            error, cosine, outputs = self._check(pass_, after, edit, touched)
        except (VerifyError, *REFUSALS) as problem:
            raise _rolled_back(pass_, problem) from problem
        metric = self._charge(pass_, after)
        added, removed = changed_calls([n.name for n in self.program.nodes()], [n.name for n in after.nodes()])
        step = Step(
            index=len(self.history.steps),
            spelling=format_pass(pass_),
            kind=pass_.kind,
            seconds=ran - started,
            check_seconds=time.perf_counter() - ran,
            size=Size.of(after) if touched else self.history.steps[-1].size,
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
        self.history.record_program(step, after, text_after)
        self.spare.clear()
        if not touched and isinstance(pass_, Rewrite) and not pass_.redefines and after is copied:
            self.spare.append((self.program, copied))
        else:
            self._replace_program(pass_, after, outputs, touched)

    def _replace_program(self, pass_: Pass, after: Program, outputs: list[list[object]], touched: bool) -> None:
        """Go on with the program after a recorded pass."""
        if not isinstance(pass_, (Rewrite, Annotation)):
            self.reference = self.reference or self.program
        if not isinstance(pass_, Rewrite):
            self.start = after
        elif touched and self.options.checks in NUMERIC:
            self.stretch = (*self.stretch, (len(self.history.steps) - 1, pass_))
        self.program, self.outputs = after, outputs
        self.lowered = {} if touched else self.lowered
        if pass_.redefines:
            self.original = answers(after, outputs)

    def _edited(self, pass_: Pass, show: Callable[[str, int, int], None] | None) -> tuple[Editor, Program]:
        """The editor of a copy of the program, after the pass, and the copy, in whose place the pass may have put another."""
        fixed = pass_.fixed(self.program) if isinstance(pass_, Training) else ()
        copied = self.program.own_copy(fixed) if isinstance(pass_, Training) else self._copied()
        data, labels, most = self.options.data, self.options.labels, self.options.most_tokens(pass_)
        edit = Editor(copied, pass_.name(), data, labels=labels, most_tokens=most, reference=self.reference, progress=show)
        try:
            self._run_pass(pass_, edit, fixed)
        except LissomError:
            if self.options.checks != "each":
                self.check_stretch()  # a pass before it may be at fault
            raise
        edit.program.drop_dead()
        return edit, copied

    def _copied(self) -> Program:
        if self.spare and self.spare[0][0] is self.program:
            return self.spare.pop()[1]
        return self.program.copy()

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
        self, pass_: Pass, after: Program, edit: Editor, touched: bool
    ) -> tuple[float | None, float | None, list[list[object]]]:
        """The error and cosine of the program after the pass, None where it was not run; the outputs of the last that was."""
        checks = self.options.checks
        if touched and checks != "off":
            verify_structure(after, self.program)
            if isinstance(pass_, Training):
                require_kept_form(self.program, after)
        if checks not in NUMERIC:
            return None, None, []
        if checks != "each" and isinstance(pass_, Rewrite):
            return None if touched else 0.0, self.history.steps[-1].cosine, self.outputs
        outputs = run_samples(after, self.samples) if touched else self.outputs
        divergence = compare(self.original, answers(after, outputs), masked=pass_.redefines)
        if not isinstance(pass_, (Rewrite, Annotation)):
            return divergence.relative_error, divergence.cosine, outputs
        bitwise = isinstance(pass_, Annotation)
        error = require_equal(self.program, after, self.samples, self.outputs, outputs, bitwise) if touched else 0.0
        edit.notes += changed_strides(self.program, self.outputs, after, outputs)
        return error, divergence.cosine, outputs

    def check_stretch(self) -> None:
        """Compare the program with the one before the latest exact passes, on all verification inputs.

        Raises:
            VerifyError: naming the pass that is wrong on one of them.
        """
        stretch, start, began, steps = self.stretch, self.start, time.perf_counter(), self.history.steps
        self.stretch, self.start = (), self.program
        if not stretch:
            return
        # Of an example of more work, the first sample has some rows.
        given = more_samples(start.signature, self.samples[0], min(steps[0].size.flops, LARGE_WORK))
        # Where every pass is checked, the outputs are those of the last program, and not of `start`.
        each = self.options.checks == "each"
        first, known = (self.samples[:1], []) if each else (self.samples, self.outputs)
        samples, wanted, notes = run_original(start, [*first, *given], known)
        try:
            outputs = run_samples(self.program, samples)
            error = require_equal(start, self.program, samples, wanted, outputs, strict=not each)
        except (VerifyError, *REFUSALS):
            self._find_wrong(stretch, start, samples, wanted)
            outputs = run_samples(self.program, samples)
            error = max(output_errors(answers(start, wanted), answers(self.program, outputs)), default=0.0)
        last = stretch[-1][0]
        steps[last] = replace(steps[last], check_seconds=steps[last].check_seconds + time.perf_counter() - began)
        if not each:
            strides = changed_strides(start, wanted, self.program, outputs)
            self.outputs = outputs[: len(self.samples)]
            cosine = compare(self.original, answers(self.program, self.outputs)).cosine
            steps[last] = replace(steps[last], relative_error=error, notes=(*steps[last].notes, *strides))
            steps[last:] = [replace(step, cosine=cosine) for step in steps[last:]]
        fresh = [note for note in notes if note not in steps[0].notes]
        steps[0] = replace(steps[0], notes=(*steps[0].notes, *fresh))

    def _find_wrong(
        self, stretch: Sequence[tuple[int, Pass]], start: Program, samples: list[Sample], wanted: list[list[object]]
    ) -> None:
        """Run exact passes again, each checked on all inputs; rounding errors may add up although no pass is wrong.

        Raises:
            VerifyError: naming the pass.
        """
        again = copy(self)
        again.options = replace(self.options, checks="each")
        again.history = History(self.history.pipeline, self.history.checks, self.history.steps[:1], [start.text()])
        again.program, again.samples, again.outputs, again.original = start, samples, wanted, answers(start, wanted)
        for index, pass_ in stretch:
            try:
                again.step(pass_)
            except LissomError:
                self.history.cut(index)
                raise

    def _charge(self, pass_: Pass, after: Program) -> float | None:
        """The metric of the program, measured after every pass that may change it; checked against the budget."""
        if isinstance(pass_, (Rewrite, Annotation)):
            return self.history.steps[-1].metric
        score, allowed = self._measure(after), self.options.max_drop
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
        if self.options.metric is None:
            return None
        with torch.no_grad(), kept_state(program):
            return read_score(self.options.metric(program), original=self.score is None)


def _rolled_back(pass_: Pass, problem: Exception) -> VerifyError:
    what = "" if isinstance(problem, VerifyError) else f"the program does not run after it: {type(problem).__name__}: "
    return VerifyError(f"{format_pass(pass_)} was rolled back: {what}{problem}")


def _version(tensor: torch.Tensor) -> int:
    """The number of in-place writes to a tensor; 0 for tensors created in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
