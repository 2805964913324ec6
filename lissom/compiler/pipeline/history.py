"""The history of a pipeline: one record per step, as table rows, as JSON, and as a text diff between any two steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, get_args

from lissom.compiler.analysis.cost import Cost, example_cost, flops
from lissom.compiler.ir.editor import CurvePoint, Skip
from lissom.compiler.ir.node import Origin, origin
from lissom.compiler.ir.printer import unified_diff
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.options import Checks
from lissom.errors import LissomError, UnsupportedError
from lissom.io.fields import check_fields, count, optional, real, shown, take, take_list, take_text, text

FORMAT_VERSION = 1
_NOTHING = Cost()


@dataclass(frozen=True)
class Size:
    """The size of a program.

    Attributes:
        nodes: operator calls.
        parameters: elements of all weights and buffers.
        parameter_bytes: their bytes.
        flops: at the captured sizes.

    Examples:
        >>> import torch, lissom
        >>> lissom.optimize(torch.nn.Linear(4, 2), torch.randn(3, 4)).report.history.steps[0].size
        Size(nodes=1, parameters=10, parameter_bytes=40, flops=48)
    """

    nodes: int
    parameters: int
    parameter_bytes: int
    flops: int

    @classmethod
    def of(cls, program: Program) -> Size:
        """The size of a program."""
        return cls(len(program.nodes()), program.parameter_count, program.parameter_bytes, flops(program))


@dataclass(frozen=True)
class NodeFacts:
    """Facts of a node after a step, beside its text: the cost at the captured sizes, and the origin."""

    cost: Cost
    origin: Origin


def node_facts(program: Program, before: Mapping[str, NodeFacts] | None = None) -> dict[str, NodeFacts]:
    """The facts of every operator call of a program under its name in the text, `%gelu`, and of every weight, `@up.weight`.

    Args:
        before: facts of the program before, which unchanged nodes share.
    """
    facts: dict[str, NodeFacts] = {}
    for node in program.graph.nodes:
        if node.op not in ("call_function", "get_attr"):
            continue
        is_call = node.op == "call_function"
        name = f"%{node.name}" if is_call else f"@{node.target}"
        cost, source = example_cost(node) if is_call else _NOTHING, origin(node)
        known = None if before is None else before.get(name)
        if known is None or known.cost is not cost or known.origin is not source:
            known = NodeFacts(cost, source)
        facts[name] = known
    return facts


@dataclass(frozen=True)
class Step:
    """One pass that ran.

    Attributes:
        index: 0 is the capture.
        spelling: the pass as pipeline text.
        kind: rewrite, approximation, …
        seconds: of the pass itself.
        check_seconds: of the checks after it.
        added: the number of operator calls added.
        removed: the number removed.
        rewritten: the number of places the pass changed.
        skipped: those it could not change, with reasons.
        relative_error: of the last of several rewrites in a row against the program before the first of them, of any other
            pass against the original; None unchecked.
        cosine: the smallest cosine of an output to the original's.
        metric: the caller's score, when given.
        notes: sentences for the reader.
        reverted: why the pass was undone after it ran, or None.
        curve: the losses of a training pass; empty for any other.
        per_site: the pass as pipeline text with the amount that it chose for each site, which gives the same program; empty for
            passes without amounts.
        about: what the pass is for, the first line of its docstring.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout())
        >>> step = lissom.optimize(model, torch.randn(3, 4)).report.history.steps[2]
        >>> step.summary, step.exact, step.relative_error
        ('rewrote 1', True, 0.0)
    """

    index: int
    spelling: str
    kind: str
    seconds: float
    check_seconds: float
    size: Size
    added: int = 0
    removed: int = 0
    rewritten: int = 0
    skipped: tuple[Skip, ...] = ()
    relative_error: float | None = None
    cosine: float | None = None
    metric: float | None = None
    notes: tuple[str, ...] = ()
    reverted: str | None = None
    curve: tuple[CurvePoint, ...] = ()
    per_site: str = ""
    about: str = ""

    @property
    def exact(self) -> bool:
        """True for a pass that keeps the outputs, and for the capture."""
        return self.kind in ("capture", "rewrite", "annotation")

    @property
    def summary(self) -> str:
        """`rewrote 10 of 12; skipped 2: mask is not additive (2)`, or why the pass was reverted."""
        if self.reverted is not None:
            return f"reverted: {self.reverted}"
        total = self.rewritten + len(self.skipped)
        if self.curve:
            return f"trained {self.rewritten} weights" if self.rewritten else "gained nothing: the weights are as they were"
        if not self.skipped:
            return f"rewrote {self.rewritten}" if self.rewritten else "nothing to do"
        reasons = Counter(skip.reason for skip in self.skipped)
        listed = ", ".join(f"{reason} ({count})" if count > 1 else reason for reason, count in reasons.items())
        return f"rewrote {self.rewritten} of {total}; skipped {len(self.skipped)}: {listed}"


Changes = dict[int, dict[str, NodeFacts | None]]
"""Facts of nodes by name, by the index of a step."""


@dataclass
class History:
    """The steps of a pipeline, the capture first; grows while the pipeline runs.

    Attributes:
        pipeline: the whole pipeline as text.
        checks: how each step was checked.
        texts: the program after each step.
        changes: the facts of its nodes that differ from those of the step before, by name, None for a node that is gone; by the
            index of the step, without steps of which nothing is known.

    Examples:
        >>> import torch, lissom
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Dropout())
        >>> history = lissom.optimize(model, torch.randn(3, 4)).report.history
        >>> [step.spelling for step in history.steps[:3]]
        ['capture', 'eliminate-dead-code', 'remove-no-ops']
        >>> print(history.diff(1, 2).splitlines()[0])
        --- 1 eliminate-dead-code
    """

    pipeline: str
    checks: str
    steps: list[Step] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    changes: Changes = field(default_factory=dict[int, "dict[str, NodeFacts | None]"])
    _latest: tuple[int, Mapping[str, NodeFacts]] = field(default=(-1, {}), repr=False, compare=False)
    _read: Callable[[], tuple[list[str], Changes]] | None = field(default=None, repr=False, compare=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # Called only for an attribute that is not set, as these two of a history that was not read yet.
            if name in ("texts", "changes") and (read := self._read) is not None:
                (self.texts, self.changes), self._read = read(), None
            if name not in vars(self):
                raise AttributeError(f"a history has no attribute '{name}'")
            return vars(self)[name]

    def record(self, step: Step, text: str, facts: Mapping[str, NodeFacts] | None = None) -> None:
        """Add a step with the text and, where they are known, the facts of the program after it."""
        self.steps.append(step)
        self.texts.append(text)
        self._keep_facts(len(self.steps) - 1, facts)

    def record_program(self, step: Step, program: Program, text: str) -> None:
        """Add a step with the program after it."""
        last = len(self.steps) - 1
        is_same = not program.edits and text == self.texts[last] and last in self.changes
        before = self.facts_of(last)
        self.record(step, text, before if is_same else node_facts(program, before))

    def restart(self, step: Step, program: Program) -> None:
        """Record the capture anew."""
        self.steps[:1], self.texts[:1] = [step], [program.text()]
        self._keep_facts(0, node_facts(program))

    def cut(self, steps: int) -> None:
        """Keep only that many steps."""
        del self.steps[steps:], self.texts[steps:]

    def facts_of(self, index: int) -> Mapping[str, NodeFacts]:
        """The facts of the program after a step, by the names of nodes and weights in its text; empty if they are not known."""
        if index not in self.changes:
            return {}
        if self._latest[0] == index:
            return self._latest[1]
        facts: dict[str, NodeFacts | None] = {}
        for step in range(index + 1):
            facts |= self.changes.get(step, {})
        return {name: fact for name, fact in facts.items() if fact is not None}

    def _keep_facts(self, index: int, facts: Mapping[str, NodeFacts] | None) -> None:
        # Steps that were undone may have left some.
        for undone in [step for step in self.changes if step >= index]:
            del self.changes[undone]
        if facts is None:
            return
        before = self.facts_of(index - 1)
        changed: dict[str, NodeFacts | None] = {}
        if facts is not before:
            changed |= {name: fact for name, fact in facts.items() if before.get(name) is not fact}
            changed |= dict.fromkeys(before.keys() - facts.keys())
        self.changes[index], self._latest = changed, (index, facts)

    def note(self, sentence: str) -> None:
        """Add a sentence for the reader to the last step."""
        self.steps[-1] = replace(self.steps[-1], notes=(*self.steps[-1].notes, sentence))

    def check_step(self, index: int) -> None:
        """Raise UnsupportedError when there is no such step."""
        if not 0 <= index < len(self.steps):
            last = len(self.steps) - 1
            raise UnsupportedError(f"there is no step {index}; this history has steps 0 (capture) to {last}")

    def diff(self, before: int, after: int) -> str:
        """The lines of the program that changed between two steps (0 is the capture), in unified form.

        Raises:
            UnsupportedError: when there is no such step.
        """
        for index in (before, after):
            self.check_step(index)
        names = [f"{index} {self.steps[index].spelling}" for index in (before, after)]
        return unified_diff(self.texts[before], self.texts[after], names[0], names[1])

    def programs_to_json(self) -> dict[str, object]:
        """The texts of the programs and the facts of their nodes, ready for `json.dumps`."""
        changes = {index: {name: _fact_to_json(fact) for name, fact in facts.items()} for index, facts in self.changes.items()}
        return {"texts": self.texts, "changes": changes}

    def to_json(self) -> dict[str, object]:
        """Everything but the programs, ready for `json.dumps`."""
        steps = [_step_to_json(step) for step in self.steps]
        return {"version": FORMAT_VERSION, "pipeline": self.pipeline, "checks": self.checks, "steps": steps}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], texts: Sequence[str]) -> History:
        """The history that `to_json` wrote, with the programs' texts. Raises as `unread`."""
        history = cls.unread(data, lambda: (list(map(text, texts)), {}))
        if len(history.texts) != len(history.steps):
            raise ValueError("the history and the programs' texts do not belong together")
        return history

    @classmethod
    def unread(cls, data: Mapping[str, Any], read: Callable[[], tuple[list[str], Changes]]) -> History:
        """The history that `to_json` wrote, whose texts and changes `read` returns when they are asked for first.

        Raises:
            ValueError: when the data is no history; or TypeError, or KeyError.
        """
        if data["version"] != FORMAT_VERSION:
            raise ValueError(f"the history is of version {shown(data['version'])}; this Lissom reads version {FORMAT_VERSION}")
        checks = take(data, "checks", str)
        if checks not in get_args(Checks):
            raise ValueError(f"there are no checks {shown(checks)}")
        history = cls(take(data, "pipeline", str), checks, list(take_list(data, "steps", _step_from_json)), _read=read)
        del history.texts, history.changes
        return history


def programs_from_json(programs: Mapping[str, Any]) -> tuple[list[str], Changes]:
    """The texts and facts that `programs_to_json` wrote. Raises as `History.unread`."""
    changes = {
        int(step): {str(name): _fact_from_json(fact) for name, fact in facts.items()}
        for step, facts in programs["changes"].items()
    }
    return list(map(text, programs["texts"])), changes


def _fact_to_json(fact: NodeFacts | None) -> list[object] | None:
    if fact is None:
        return None
    cost, source = fact.cost, fact.origin
    figures = (cost.flops, cost.read_bytes, cost.written_bytes, cost.parameters)
    return [[int(figure) for figure in figures], source.module_path, source.source, source.code, source.passes, source.replaces]


def _fact_from_json(data: Sequence[Any] | None) -> NodeFacts | None:
    if data is None:
        return None
    figures, path, source, code, passes, replaces = data
    flops, read, written, parameters = map(int, figures)
    texts = [str(value) for value in (path, source, code)]
    origin = Origin(*texts, passes=tuple(str(name) for name in passes), replaces=str(replaces))
    return NodeFacts(Cost(flops, read, written, parameters), origin)


def _step_to_json(step: Step) -> dict[str, object]:
    lists: dict[str, object] = {
        "skipped": [asdict(skip) for skip in step.skipped],
        "notes": list(step.notes),
        "curve": [asdict(point) for point in step.curve],
    }
    return asdict(step) | lists | {"summary": step.summary}


def _step_from_json(data: object) -> Step:
    check_fields(data, Step, "summary")
    return Step(
        index=count(take(data, "index", int)),
        spelling=take(data, "spelling", str),
        kind=take(data, "kind", str),
        seconds=real(take(data, "seconds", object)),
        check_seconds=real(take(data, "check_seconds", object)),
        size=_size_from_json(take(data, "size", dict)),
        added=count(take(data, "added", int)),
        removed=count(take(data, "removed", int)),
        rewritten=count(take(data, "rewritten", int)),
        skipped=take_list(data, "skipped", _skip_from_json),
        relative_error=optional(data, "relative_error", real),
        cosine=optional(data, "cosine", real),
        metric=optional(data, "metric", real),
        notes=take_list(data, "notes", text),
        reverted=optional(data, "reverted", text),
        curve=optional(data, "curve", _curve_from_json) or (),
        per_site=take_text(data, "per_site"),
        about=take_text(data, "about"),
    )


def _size_from_json(data: object) -> Size:
    check_fields(data, Size)
    return Size(*(count(take(data, name, int)) for name in ("nodes", "parameters", "parameter_bytes", "flops")))


def _skip_from_json(data: object) -> Skip:
    check_fields(data, Skip)
    return Skip(*(take(data, name, str) for name in ("node", "place", "reason")))


def _curve_from_json(data: object) -> tuple[CurvePoint, ...]:
    return take_list({"curve": data}, "curve", _point_from_json)


def _point_from_json(data: object) -> CurvePoint:
    check_fields(data, CurvePoint)
    seconds, held_out = (real(take(data, name, object)) for name in ("seconds", "held_out"))
    return CurvePoint(count(take(data, "step", int)), seconds, optional(data, "loss", real), held_out)


def changed_calls(before: Sequence[str], after: Sequence[str]) -> tuple[int, int]:
    """The number of added and of removed names."""
    old, new = set(before), set(after)
    return len(new - old), len(old - new)


class Interrupted(KeyboardInterrupt):
    """The user interrupted a pipeline; `history` holds the steps that were finished."""

    def __init__(self, history: History) -> None:
        super().__init__(f"interrupted after {len(history.steps)} finished steps")
        self.history = history


@contextmanager
def stopped_with(history: History) -> Generator[None]:
    """Attach the history to the error that stops a run."""
    try:
        yield
    except LissomError as error:
        error.history = history
        raise
    except KeyboardInterrupt:
        raise Interrupted(history) from None
