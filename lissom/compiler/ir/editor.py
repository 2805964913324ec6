"""The one way passes change a program: every edit is typed, stamped with the pass, and counted."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import fx, nn

from lissom.compiler.ir import fake, printer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.formula import Formula, Match
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, spread
from lissom.compiler.ir.types import format_type
from lissom.errors import PassError

Result = TypeVar("Result")


@dataclass(frozen=True)
class CurvePoint:
    """A point of a training curve.

    Attributes:
        loss: the mean over the steps since the point before it; None at the start.
        held_out: the loss of the data held out.
    """

    step: int
    seconds: float
    loss: float | None
    held_out: float


@dataclass(frozen=True)
class Skip:
    """A place a pass looked at and left alone: which node, where it is, and why."""

    node: str
    place: str
    reason: str


class Editor:
    """Edits one program on behalf of one pass.

    Args:
        most_tokens: of the calibration inputs that the pass gets.

    Attributes:
        program: the program being changed; a pass may put another in its place.
        labels: of each calibration input, or None.
        reference: the program before the first pass that changed numbers; None where that is this one.
        rewritten: how many places the pass changed.
        skipped: the places it could not treat, with the reason.
        notes: sentences on the pass as a whole, for the reader of the history.
        curve: the losses of a training pass over its steps.
        per_site: the pass as text with the amount that it chose for each site; empty for passes without amounts.
        current: the node the pass is looking at, for error messages.
    """

    def __init__(
        self,
        program: Program,
        pass_name: str,
        data: Sequence[Sample] = (),
        *,
        labels: Sequence[torch.Tensor | None] = (),
        most_tokens: int | None = None,
        reference: Program | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.program = program
        self.pass_name = pass_name
        self._data = data
        self.labels = labels
        self._most_tokens = most_tokens
        self.reference = reference
        self._progress = progress
        self.rewritten = 0
        self.skipped: list[Skip] = []
        self.notes: list[str] = []
        self.curve: list[CurvePoint] = []
        self.per_site = ""
        self.current: fx.Node | None = None

    @cached_property
    def data(self) -> Sequence[Sample]:
        """Calibration inputs, flat; empty when the caller gave none."""
        data = self._data if self._most_tokens is None else spread(self._data, self._most_tokens)
        if len(data) < len(self._data):
            self.note(f"calibrated on {len(data):,} of {len(self._data):,} batches of data=, evenly spaced")
        return data

    def nodes(self, *targets: object) -> Iterator[fx.Node]:
        """The program's call nodes (of these targets) in order; nodes erased meanwhile are passed over."""
        for node in self.program.nodes(*targets):
            if not node._erased:
                self.current = node
                yield node
        self.current = None

    def matches(self, formula: Formula) -> Iterator[Match]:
        """The first match of a formula at each call that computes it, in order; the program may change in between."""
        for node in self.nodes(*formula.targets):
            if (found := formula.match(node, self.program)) is not None:
                yield found

    def treatable(self, obstacle: Callable[[fx.Node], str | None], *targets: object) -> Iterator[fx.Node]:
        """The nodes of these targets that `obstacle` gives no reason against; the others are reported with the reason."""
        for node in self.nodes(*targets):
            if self.may_change(node, obstacle(node)):
                yield node

    def may_change(self, node: fx.Node, reason: str | None) -> bool:
        """True when there is no reason against changing a node; otherwise the node is reported as skipped."""
        if reason is not None:
            self.skip(node, reason)
        return reason is None

    def accepted(self, results: Iterable[tuple[fx.Node, Result | str]]) -> dict[fx.Node, Result]:
        """The results of an analysis by node; a node with a reason in place of a result is reported as skipped."""
        kept: dict[fx.Node, Result] = {}
        for node, result in results:
            if isinstance(result, str):
                self.skip(node, result)
            else:
                kept[node] = result
        return kept

    def tensor(self, read: fx.Node) -> torch.Tensor:
        """The weight or buffer that a node reads, without gradients."""
        return self.program.weight(str(read.target)).detach()

    def report(self, what: str, finished: int, total: int) -> None:
        """Report the progress of a long pass: the current step, the number of finished steps, and the total."""
        if self._progress is not None:
            self._progress(what, finished, total)

    def skip(self, node: fx.Node, reason: str) -> None:
        """Report a place the pass leaves as it is."""
        self.skipped.append(Skip(node.name, printer.place(self.program, node), reason))

    def note(self, sentence: str) -> None:
        """Tell the reader of the history something about the pass as a whole."""
        self.notes.append(sentence)

    @contextmanager
    def before(self, node: fx.Node, like: Sequence[fx.Node] = ()) -> Generator[None]:
        """Insert the nodes created inside before `node`; their origin is that of the nodes in `like`, else of `node`."""
        self._like = [*like] or [node]
        with self.program.graph.inserting_before(node):
            yield

    def call(self, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        """A new, typed call node; use inside `before`. Operands of None at the end are left out.

        Raises:
            PassError: when the operator does not accept these arguments.
        """
        while args and args[-1] is None:
            args = args[:-1]
        name = target._schema.name.partition("::")[2]
        node = self.program.graph.create_node("call_function", target, name=name)
        nodes.set_arguments(node, *args, **kwargs)
        return self._made(node)

    def again(self, node: fx.Node, first: object) -> fx.Node:
        """The call of a node with another first argument; use inside `before`."""
        return self.call(nodes.overload(node), first, *node.args[1:], **node.kwargs)

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """The size of one dimension as an argument for a call: a number, or a node that reads it; use inside `before`."""
        size = nodes.tensor_type(node).shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, node, dim)

    def compute_size(self, function: Callable[[int, int], int], size: fx.Node, number: fx.Node | int) -> fx.Node:
        """A size computed from another while the program runs, such as `operator.mul(batch, 4)`; use inside `before`."""
        return self._made(self.program.graph.call_function(function, (size, number)))

    def item(self, pieces: fx.Node, index: int) -> fx.Node:
        """One of the values of a call that returns several, such as a piece of a split; use inside `before`."""
        return self._made(self.program.graph.call_function(operator.getitem, (pieces, index)))

    def _made(self, node: fx.Node) -> fx.Node:
        """A new node, with its origin and type."""
        nodes.set_origin(node, nodes.merged_origin(self._like).changed_by(self.pass_name))
        self._type(node)
        return node

    def weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A read of a new weight or buffer; a name in use gets a number; use inside `before`."""
        unique, number = name, 1
        while self.program.is_taken(unique):
            unique, number = f"{name}_{number}", number + 1
        self.program.set_weight(unique, tensor)
        node = self.program.graph.get_attr(unique)
        node._rename(unique.replace(".", "_"))
        nodes.set_value(node, fake.fake_weight(self.program.fake_mode, tensor))
        nodes.set_origin(node, nodes.merged_origin(self._like).changed_by(self.pass_name))
        return node

    def like(self, read: fx.Node, tensor: torch.Tensor) -> torch.Tensor:
        """Floating-point values derived from a weight, as a parameter where the weight is one."""
        old = self.program.weight(str(read.target))
        trainable = isinstance(old, nn.Parameter) and tensor.is_floating_point()
        return nn.Parameter(tensor, requires_grad=old.requires_grad) if trainable else tensor

    def exchange_state(self, old: fx.Node, new: Mapping[str, torch.Tensor]) -> list[fx.Node]:
        """Replace a state that nothing reads or writes any more by new state; returns its reads. Use inside `before`."""
        reads = [self.weight(name, tensor) for name, tensor in new.items()]
        names = [str(read.target) for read in reads]
        state = self.program.state
        self.program.state = tuple(state_name for name in state for state_name in (names if name == old.target else [name]))
        return reads

    def set_weight(self, node: fx.Node, tensor: torch.Tensor, *, retype: bool = True) -> None:
        """Give a weight new values in this program only; calls that depend on it are retyped now, or by `retype` later.

        A tensor that replaces a trainable parameter becomes one.
        """
        old = self.program.weight(str(node.target))
        if isinstance(old, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
        self.program.set_weight(str(node.target), tensor)
        nodes.set_value(node, fake.fake_weight(self.program.fake_mode, tensor))
        self._stamp(node)
        if retype and (old.shape != tensor.shape or old.dtype != tensor.dtype):
            self.retype_from(node)

    def change_call(self, node: fx.Node, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> None:
        """Let a node call another operator, or the same with other arguments; retypes it. Counts as one place rewritten.

        Raises:
            PassError: when the operator does not accept these arguments.
        """
        node.target = target
        nodes.set_arguments(node, *args, **kwargs)
        self._stamp(node)
        self._type(node)
        self.rewritten += 1

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let everything that reads `old` read `new`; `old` is erased. Counts as one place rewritten.

        Raises:
            PassError: when the two have different types.
        """
        program = self.program
        wanted, actual = nodes.node_type(old), nodes.node_type(new)
        if not fake.same_type(program.fake_mode, wanted, actual):
            name_of = program.signature.name_of
            raise PassError(
                f"{self.pass_name}: {printer.place(program, old)} yields {format_type(wanted, name_of)}, but its "
                f"replacement {printer.place(program, new)} yields {format_type(actual, name_of)}; "
                f"a replacement must have the same type\n{printer.excerpt(program, old)}"
            )
        old.replace_all_uses_with(new)
        if self.pass_name in nodes.origin(new).passes and not nodes.origin(new).replaces:
            self.succeed(old, new)
        program.graph.erase_node(old)
        program.edits += 1
        self.rewritten += 1

    def succeed(self, old: fx.Node, new: fx.Node) -> None:
        """Record that a new node computes what `old` did; needed where their shapes differ, as `replace` does it otherwise."""
        nodes.set_origin(new, replace(nodes.origin(new), replaces=old.name))

    def replace_by(self, old: fx.Node, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        """Replace a node by a new call, and return the call; see `before`, `call` and `replace`."""
        with self.before(old):
            new = self.call(target, *args, **kwargs)
        self.replace(old, new)
        return new

    def move_before(self, node: fx.Node, place: fx.Node) -> None:
        """Move a node and the nodes it depends on in front of `place`; none of them may depend on `place`."""
        needed, late = set(computed_from([node])), False
        for current in list(self.program.graph.nodes):
            late = late or current is place
            if late and current in needed:
                place.prepend(current)
                self.program.edits += 1

    def erase(self, node: fx.Node) -> None:
        """Remove a node nothing reads. Counts as one place rewritten."""
        self.program.graph.erase_node(node)
        self.program.edits += 1
        self.rewritten += 1

    def retype(self) -> None:
        """Retype every call, after literal sizes in the program changed."""
        for node in self.program.nodes():
            self.retype_call(node)

    def retype_from(self, node: fx.Node) -> None:
        """Retype all calls that depend on a node, after its own type changed."""
        changed = {node}
        for call in self.program.graph.nodes:
            if call.op == "call_function" and not changed.isdisjoint(call.all_input_nodes):
                self._type(call)
                changed.add(call)

    def retype_readers(self, changed: Iterable[fx.Node]) -> None:
        """Retype the calls that read these nodes, whose types changed, and on from each call whose own type changes.

        Others keep their types: sizes that depend on values cannot always be inferred again.
        """
        reached = set(changed)
        for call in self.program.nodes():
            if not reached.isdisjoint(call.all_input_nodes):
                before = nodes.node_type(call)
                self.retype_call(call)
                if nodes.node_type(call) != before:
                    reached.add(call)

    def retype_call(self, node: fx.Node) -> None:
        """Retype a call after its inputs changed, and record the pass on it when its type changed."""
        before = nodes.node_type(node)
        self._type(node)
        if nodes.node_type(node) != before:
            self._stamp(node)

    def _stamp(self, node: fx.Node) -> None:
        nodes.set_origin(node, nodes.origin(node).changed_by(self.pass_name))
        self.program.edits += 1

    def _type(self, node: fx.Node) -> None:
        try:
            nodes.set_value(node, fake.known_call(self.program.fake_mode, node))
        # The fake implementation of an operator, ours or another library's, may raise anything; the error is kept as the cause.
        except Exception as error:
            shown = printer.argument_text([*node.args, *node.kwargs.values()])
            raise PassError(
                f"{self.pass_name}: {printer.target_text(node.target)} does not accept the arguments {shown}: {error}"
            ) from error
        self.program.edits += 1
