"""A program as text: one node per line, with its type, under stable names, without ids, times or weight data."""

from __future__ import annotations

import difflib
from typing import Protocol

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.signature import Signature
from lissom.compiler.ir.types import format_type, short_dtype

END = 2**63 - 1
"""The end of a slice that has none."""


class PrintableProgram(Protocol):
    """The parts of a `Program` that its text shows."""

    @property
    def name(self) -> str: ...
    @property
    def signature(self) -> Signature: ...
    @property
    def state(self) -> tuple[str, ...]: ...
    @property
    def graph(self) -> fx.Graph: ...


def program_text(program: PrintableProgram) -> str:
    """The whole program: its signature, its weights, its nodes."""
    lines = [f"program {program.name}{program.signature.describe()} {{"]
    lines += [f"  weight {line}" for line in _weight_lines(program)]
    lines += [f"  {node_text(program, node)}" for node in program.graph.nodes if node.op in ("call_function", "output")]
    lines += ["}"]
    return "\n".join(lines) + "\n"


def _weight_lines(program: PrintableProgram) -> list[str]:
    reads = [node for node in program.graph.nodes if node.op == "get_attr"]
    state = set(program.state)
    return [
        f"@{node.target}: {_type_text(program, node)}{_placement_text(node)}" + (" state" if node.target in state else "")
        for node in sorted(reads, key=lambda node: str(node.target))
    ]


def node_text(program: PrintableProgram, node: fx.Node) -> str:
    """One node: `%gelu: f32[batch, sequence, 1536] = aten.gelu(%linear_4)  # encoder.layer.0.intermediate`."""
    if node.op == "output":
        return f"return {argument_text(node.args[0])}"
    if node.op == "placeholder":
        return f"input %{node.name}: {_type_text(program, node)}"
    if node.op == "get_attr":
        return f"weight @{node.target}: {_type_text(program, node)}"
    arguments = [argument_text(argument) for argument in node.args]
    arguments += [f"{key}={argument_text(argument)}" for key, argument in node.kwargs.items()]
    path = nodes.origin(node).module_path
    place = f"  # {path}" if path else ""
    type_ = f"{_type_text(program, node)}{_placement_text(node)}"
    return f"%{node.name}: {type_} = {target_text(node.target)}({', '.join(arguments)}){place}"


def _type_text(program: PrintableProgram, node: fx.Node) -> str:
    return format_type(nodes.node_type(node), program.signature.name_of) if nodes.has_value(node) else "untyped"


def _placement_text(node: fx.Node) -> str:
    """The value's placement across ranks, such as ` Shard(2)` or ` Partial`; empty when it is replicated or unknown."""
    placed = nodes.placed(node)
    parts = placed if isinstance(placed, tuple) else (placed,)
    if all(part is None or part.is_replicated for part in parts):
        return ""
    return " " + ", ".join(dict.fromkeys(map(str, parts)))


def target_text(target: object) -> str:
    """The operator's short name: `aten.linear`, `aten.add.Tensor`, `operator.mul`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    module = getattr(target, "__module__", "").removeprefix("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def argument_text(argument: object) -> str:
    """One argument as text: `%node`, `@weight`, a list, a dtype, a number."""
    match argument:
        case fx.Node():
            return f"@{argument.target}" if argument.op == "get_attr" else f"%{argument.name}"
        case tuple() | list():
            return "[" + ", ".join(argument_text(part) for part in argument) + "]"
        case torch.dtype():
            return short_dtype(argument)
        case torch.device() | torch.layout() | torch.memory_format():
            return str(argument).removeprefix("torch.")
        case int() if argument == END:
            return "end"
        case _:
            return repr(argument)


def excerpt(program: PrintableProgram, node: fx.Node, radius: int = 2) -> str:
    """The lines around a node, the node's own marked with `>`."""
    lines = [neighbour for neighbour in program.graph.nodes if neighbour.op != "get_attr"]
    centre = lines.index(node) if node in lines else 0
    around = lines[max(0, centre - radius) : centre + radius + 1]
    return "\n".join(f"  {'>' if neighbour is node else ' '} {node_text(program, neighbour)}" for neighbour in around)


def place(program: PrintableProgram, node: fx.Node) -> str:
    """The location of a node, in words: `'matmul_3' (aten.matmul, in encoder.layer.1.attention, modeling.py:88)`."""
    origin = nodes.origin(node)
    what = target_text(node.target) if node.op == "call_function" else node.op
    parts = [what, f"in {origin.module_path}" if origin.module_path else "", origin.source]
    return f"'{node.name}' ({', '.join(part for part in parts if part)})"


def unified_diff(before: str, after: str, before_name: str, after_name: str) -> str:
    """The lines that differ between two program texts, in unified form; empty when there are none."""
    return "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), before_name, after_name, n=1))
