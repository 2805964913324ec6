"""Carry out a plan of tensor parallelism: collectives where values are redistributed, local sizes, and weights for each rank.

All ranks get one graph. What differs between them is in weights: which rows of a vocabulary a rank has, which part of a whole
value it takes, whether it is the one that keeps a value which is to be summed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from lissom.compiler.analysis.axes.views import every_nth, slice_bounds
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, ALL_REDUCE, GROUP, WAIT
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import CONVOLUTIONS, SIZES_AT, SPLITS
from lissom.compiler.ir.placement import REPLICATED, Placed, Span, Spans, indices_of, local_part, local_size
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.types import Size, TensorType
from lissom.compiler.parallel.partition.joint import Joint
from lissom.compiler.parallel.partition.merge_collectives import merge_collectives
from lissom.compiler.parallel.partition.sequence import Positions
from lissom.compiler.parallel.plan import redistribution_steps
from lissom.compiler.parallel.rules.base import Reading
from lissom.compiler.parallel.rules.gathered import outcome, own_part
from lissom.compiler.parallel.rules.joint import joint_dim, joint_span
from lissom.compiler.parallel.sites import linear_layers
from lissom.errors import PassError
from lissom.ops.quantization import fake_quantize_dynamic

aten = torch.ops.aten


def cut_program(edit: Editor, ways: int) -> None:
    """Cut a program whose every value is placed for so many ranks; it holds the weights of all of them afterwards.

    Raises: PassError when a value is not placed, or was changed since.
    """
    _Cutter(edit, ways).run()


class _Cutter:
    def __init__(self, edit: Editor, ways: int) -> None:
        self.edit = edit
        self.program = edit.program
        self.ways = ways
        self.known = {node: self._placed(node) for node in self.program.graph.nodes if node.op != "output"}
        self.types = {node: nodes.node_type(node) for node in self.known}
        by_position = any(isinstance(item, Placed) and item.is_by_position for item in self.known.values())
        # A layer that is cut by columns and yet gives a whole result is one that is gathered at once.
        layers = {node for node, _ in linear_layers(self.program)}
        gathered = {node for node in layers if self.known[node] == REPLICATED}
        self.read = Reading(self.known, self._as_planned, ways, self.program.constant, by_position, gathered)
        self.moved: dict[tuple[fx.Node, Placed], fx.Node] = {}
        self.stands_for: dict[fx.Node, fx.Node] = {}
        self.own: dict[str, list[torch.Tensor]] = {}
        self.reads: dict[str, str] = {}
        self.joint = Joint(edit, ways, self._own, self._reduced)
        self.positions = Positions(edit, ways, self._own)
        self.wanted_whole: set[fx.Node] = set()

    def _placed(self, node: fx.Node) -> Placed | tuple[Placed, ...]:
        found = nodes.placed(node)
        if found is None:
            raise PassError(f"cut: {place(self.program, node)} has no placement; put `shard` right before `cut`")
        return found

    def _as_planned(self, node: fx.Node, dim: int) -> Spans:
        found = self.known[node]
        return found.spans(dim) if isinstance(found, Placed) else ()

    def run(self) -> None:
        wants = [(node, self._outcome(node)) for node in self.program.nodes()]
        together = {node: span for node, _ in wants if (span := joint_span(node, self.read)) is not None}
        parts = {node: found.result for node in self.read.gathered if (found := own_part(node, self.read)) is not None}
        self.wanted_whole = {item for _, wanted in wants for item, want in wanted.items() if want.is_replicated}
        self.wanted_whole.update(self.program.output.all_input_nodes)
        self._cut_weights()
        for node, wanted in wants:
            # One of several results was replaced with the call that gave them.
            if not node._erased:
                self.edit.current = node
                self._follow(node, wanted, together.get(node))
                if node in parts:
                    self._gather_at_once(node, cast(Placed, parts[node]))
        for leaf in self.program.output.all_input_nodes:
            found = self.known[leaf]
            if isinstance(found, Placed) and not found.is_replicated:
                whole = self._move(leaf, REPLICATED, self.program.output)
                self.program.output.replace_input_with(leaf, whole)
        self.edit.current = None
        if merged := merge_collectives(self.edit):
            self.edit.note(f"{merged} collectives joined others that are ready with them")
        names = [str(node.target) for node in self.program.graph.nodes if node.op == "get_attr"]
        weights = {name: self.own.get(name) or [self.program.weight(name)] * self.ways for name in names}
        self.program.ranks = tuple({name: parts[rank] for name, parts in weights.items()} for rank in range(self.ways))

    def _outcome(self, node: fx.Node) -> dict[fx.Node, Placed]:
        """How a call wants its arguments; the plan must still hold."""
        found = outcome(node, self.read)
        if found.result != self.known[node]:
            raise PassError(
                f"cut: {place(self.program, node)} would yield {found.result}, but the plan says {self.known[node]}: it was "
                f"changed since; put `shard` right before `cut`"
            )
        return dict(found.wants)

    def _cut_weights(self) -> None:
        """Give every rank its part of each weight; a weight that all have stays shared, state is each rank's own."""
        for node in [node for node in self.program.graph.nodes if node.op == "get_attr"]:
            name, placed = str(node.target), self.known[node]
            assert isinstance(placed, Placed)
            is_state = name in self.program.state
            if placed.is_replicated and not is_state:
                continue
            weight = self.program.weight(name)
            if name not in self.own:
                parts = [local_part(weight.detach(), placed, rank) for rank in range(self.ways)]
                if is_state:
                    parts = [part.clone() for part in parts]
                if isinstance(weight, nn.Parameter):
                    parts = [nn.Parameter(part, requires_grad=weight.requires_grad) for part in parts]
                self.own[name] = parts
                self.edit.rewritten += 1
            self.edit.set_weight(node, self.own[name][0], retype=False)

    def _follow(self, node: fx.Node, wants: dict[fx.Node, Placed], joint: Span | None) -> None:
        """Let a call read what it wants, correct the sizes in it, and type it anew."""
        for item, want in wants.items():
            item = self.stands_for.get(item, item)
            node.replace_input_with(item, self._move(item, want, node))
        placed = self.known[node]
        if nodes.is_call(node, aten.embedding.default):
            table = self.known[cast(fx.Node, node.args[0])]
            assert isinstance(table, Placed)
            if table.spans(0):
                self._look_up(node, table.spans(0)[0])
                return
        if node.target is fake_quantize_dynamic and isinstance(placed, Placed):
            last = cast(TensorType, self.types[node]).rank - 1
            if placed.spans(last):
                with self.edit.before(node):
                    found = self.joint.round_together(node, placed.spans(last))
                self._replace(node, found)
                return
        if joint is not None:
            self._work_out(node, joint)
            return
        if _is_cut(placed) or any(_is_cut(self.known.get(item, REPLICATED)) for item in node.all_input_nodes):
            self._correct(node, placed)
        # What reads the same as before keeps its type: sizes told by values would get new symbols, with nothing known of them.
        if wants or _is_cut(placed) or any(nodes.node_type(item) != self.types.get(item) for item in node.all_input_nodes):
            self.edit.retype_call(node)

    def _correct(self, node: fx.Node, placed: Placed | tuple[Placed, ...]) -> None:
        """The sizes and places written into a call become those of a rank."""
        if node.target in SIZES_AT and isinstance(placed, Placed):
            self._correct_sizes(node, placed)
        elif node.target in SPLITS:
            dim = cast(int, nodes.argument(node, "dim"))
            types = cast("tuple[TensorType, ...]", self.types[node])
            at = dim % types[0].rank
            parts = placed if isinstance(placed, tuple) else (placed,)
            if any(part.spans(at) for part in parts):
                sizes = [local_size(part.spans(at), found.shape[at]) for part, found in zip(parts, types, strict=True)]
                node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], sizes, dim), {}  # pyright: ignore
        elif nodes.is_call(node, *CONVOLUTIONS) and isinstance(placed, Placed):
            # Only one with a kernel a channel is cut.
            if spans := placed.spans(1):
                nodes.set_argument(node, "groups", local_size(spans, cast(TensorType, self.types[node]).shape[1]))
        elif node.target is aten.slice.Tensor:
            self._correct_slice(node)
        elif node.target is aten.repeat_interleave.self_int and isinstance(placed, Placed):
            item, times, *rest = node.args
            dim = cast(int, rest[0]) if rest else cast(int, nodes.argument(node, "dim"))
            size = cast(TensorType, self.types[cast(fx.Node, item)]).shape[dim]
            if size == 1 and placed.spans(dim % cast(TensorType, self.types[node]).rank):
                new = local_size(placed.spans(dim % cast(TensorType, self.types[node]).rank), cast(int, times))
                node.args = (item, new, *rest)  # pyright: ignore[reportAttributeAccessIssue]

    def _correct_sizes(self, node: fx.Node, placed: Placed) -> None:
        index = SIZES_AT[node.target]
        sizes = [*cast("list[object]", node.args[index])]
        whole, first = cast(TensorType, self.types[node]), 0
        if node.target is aten.unflatten.int:
            first = cast(int, node.args[1]) % (whole.rank - len(sizes) + 1)
        for at, size in enumerate(sizes):
            spans = placed.spans(at + first)
            if not spans or size == -1:
                continue
            if isinstance(size, fx.Node):
                # A size that varies has one that is cut as a factor, such as batch · heads.
                with self.edit.before(node):
                    times = self.edit.compute_size(operator.mul, size, cast(int, spans[0].block))
                    sizes[at] = self.edit.compute_size(operator.floordiv, times, cast(int, spans[0].size))
            else:
                sizes[at] = local_size(spans, cast(int, size))
        node.args = (*node.args[:index], sizes, *node.args[index + 1 :])  # pyright: ignore[reportAttributeAccessIssue]

    def _correct_slice(self, node: fx.Node) -> None:
        item = cast(fx.Node, node.args[0])
        have, typed = self.known[item], cast(TensorType, self.types[item])
        dim = cast(int, nodes.argument(node, "dim")) % typed.rank
        spans = have.spans(dim) if isinstance(have, Placed) else ()
        if not spans:
            return
        if every_nth(node, typed.shape[dim]):
            start, step = nodes.argument(node, "start"), nodes.argument(node, "step")
            node.args, node.kwargs = (item, dim, start, None, step), {}  # pyright: ignore[reportAttributeAccessIssue]
            return
        bounds = slice_bounds(node, typed.shape[dim]) or (0, typed.shape[dim])
        places = [_local_place(spans, cast(int, bound)) for bound in bounds]
        node.args, node.kwargs = (item, dim, *places), {}  # pyright: ignore[reportAttributeAccessIssue]

    def _move(self, value: fx.Node, want: Placed, reader: fx.Node) -> fx.Node:
        """The value as it is wanted, made before the first that wants it."""
        if (value, want) in self.moved:
            return self.moved[value, want]
        have = self.known[value]
        assert isinstance(have, Placed)
        found = value
        with self.edit.before(reader, like=[value]):
            for step in redistribution_steps(have, want, self.ways, has_whole=value in self.wanted_whole) or ():
                match step:
                    case "slice" if have.partial and want.is_by_position:
                        found = self.positions.own_part(self._move(value, REPLICATED, reader), want)
                    case "slice" if want.is_by_position:
                        found = self.positions.own_part(found, want)
                    case "reduce-scatter":
                        found = self.positions.scattered(found, want)
                    case "spread":
                        found = self.positions.spread(found, have)
                    case "all-gather" if have.is_by_position:
                        found = self.positions.gathered(found, have)
                    case "all-reduce":
                        found = self._reduced(found, "sum")
                    case "all-gather":
                        found = self._gathered(found, have, cast(TensorType, self.types[value]).shape)
                    case "mask":
                        typed = nodes.tensor_type(value)
                        parts = [torch.full((), float(rank == 0), dtype=typed.dtype) for rank in range(self.ways)]
                        found = self.edit.call(aten.mul.Tensor, found, self._own(f"rank.is_first_{_short(typed)}", parts))
                    case _:
                        found = self._sliced(found, want)
        self.edit.rewritten += 1
        self.moved[value, want] = found
        nodes.set_placed(found, want)
        return found

    def _call(self, placed: Placed, target: torch._ops.OpOverload, *args: object, **kwargs: object) -> fx.Node:
        node = self.edit.call(target, *args, **kwargs)
        nodes.set_placed(node, placed)
        return node

    def _reduced(self, value: fx.Node, reduction: str) -> fx.Node:
        return self._call(REPLICATED, WAIT, self._call(REPLICATED, ALL_REDUCE, value, reduction, GROUP))

    def _gathered(self, value: fx.Node, have: Placed, shape: Sequence[Size]) -> fx.Node:
        """The blocks of all ranks laid end to end, what was added to make them even left out."""
        ((dim, (span,)),) = have.dims
        # The operator gathers along the first dimension.
        if dim:
            value = self.edit.call(aten.transpose.int, value, 0, dim)
            value = self.edit.call(aten.clone.default, value, memory_format=torch.contiguous_format)
        found = self.edit.call(WAIT, self.edit.call(ALL_GATHER, value, self.ways, GROUP))
        if dim:
            found = self.edit.call(aten.transpose.int, found, 0, dim)
        return self.edit.call(aten.slice.Tensor, found, dim, 0, shape[dim]) if span.is_padded else found

    def _sliced(self, value: fx.Node, want: Placed) -> fx.Node:
        """A rank's part of a whole value; where it has none, any other, since what it is multiplied with is zero."""
        for dim, spans in want.dims:
            parts = [indices_of(spans, rank).clamp_min(0) for rank in range(self.ways)]
            name = f"rank.indices_{'_'.join(f'{s.outer}x{s.size}x{s.inner}by{s.parts}e{s.every}' for s in spans)}"
            value = self.edit.call(aten.index_select.default, value, dim, self._own(name, parts))
        return value

    def _own(self, name: str, parts: list[torch.Tensor]) -> fx.Node:
        """A read of a weight that each rank has its own of; equal ones are kept once."""
        device = self._device()
        parts = [part.to(device) for part in parts]
        if name not in self.reads:
            node = self.edit.weight(name, parts[0])
            self.reads[name] = str(node.target)
            self.own[str(node.target)] = parts
        else:
            node = self.program.graph.get_attr(self.reads[name])
            nodes.set_value(node, self._value_of(self.reads[name]))
        nodes.set_placed(node, REPLICATED)
        return node

    def _value_of(self, name: str) -> object:
        return next(
            nodes.value(node)
            for node in self.program.graph.nodes
            if node.op == "get_attr" and node.target == name and nodes.has_value(node)
        )

    def _device(self) -> torch.device:
        typed = next(item for item in self.types.values() if isinstance(item, TensorType))
        return typed.device

    def _look_up(self, node: fx.Node, span: Span) -> None:
        """Rows of a rank's part of a vocabulary, zeros for the rows of others."""
        table, ids = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        block = cast(int, span.block)
        starts = [torch.full((), rank // span.every % span.parts * block, dtype=torch.int64) for rank in range(self.ways)]
        with self.edit.before(node):
            own = self.edit.call(aten.sub.Tensor, ids, self._own(f"rank.first_row_{span.size}by{span.parts}", starts))
            held = self.edit.call(aten.clamp.default, own, 0, block - 1)
            others = self.edit.call(aten.unsqueeze.default, self.edit.call(aten.ne.Tensor, own, held), -1)
            found = self.edit.call(aten.embedding.default, table, held)
            found = self.edit.call(aten.masked_fill.Scalar, found, others, 0)
        self._replace(node, found)

    def _gather_at_once(self, node: fx.Node, part: Placed) -> None:
        """Let all ranks have the whole of what each computes its columns of."""
        with self.edit.before(node):
            own = self._call(part, cast(torch._ops.OpOverload, node.target), *node.args, **node.kwargs)
            found = self._gathered(own, part, cast(TensorType, self.types[node]).shape)
        self._replace(node, found)

    def _work_out(self, node: fx.Node, span: Span) -> None:
        """Let ranks work out together what reads a dimension that is cut."""
        item, dim = cast(TensorType, self.types[cast(fx.Node, node.args[0])]), cast(int, joint_dim(node))
        typed = self.types[node]
        result = (typed[0] if isinstance(typed, tuple) else typed).dtype  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        with self.edit.before(node):
            found = self.joint.work_out(node, item, result, dim, span)
        if not isinstance(typed, tuple):
            self._replace(node, found[0])
            return
        for user in list(node.users):
            self._replace(user, found[cast(int, user.args[1])])
        self.edit.erase(node)

    def _replace(self, node: fx.Node, found: fx.Node) -> None:
        """Let a call that a rank does otherwise go, its type on a rank now that of what stands for it."""
        placed = self.known[node]
        self.stands_for[node] = found
        if node in self.wanted_whole:
            self.wanted_whole.add(found)
        self.types[found], self.known[found] = self.types[node], placed
        nodes.set_placed(found, placed)
        nodes.set_value(node, nodes.value(found))
        self.edit.replace(node, found)


def _is_cut(placed: Placed | tuple[Placed, ...]) -> bool:
    return any(item.is_sharded for item in (placed if isinstance(placed, tuple) else (placed,)))


def _local_place(spans: Spans, place: int) -> int:
    """Where a rank has what is at this place of a dimension, which is where a span ends."""
    passed, local = 0, 0
    for span in spans:
        if passed >= place:
            return local
        passed, local = passed + cast(int, span.whole), local + cast(int, span.local)
    return local


def _short(typed: TensorType) -> str:
    return str(typed.dtype).removeprefix("torch.")
