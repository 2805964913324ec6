"""Checks that a program is well formed: order, names, dialect, types, signature."""

from __future__ import annotations

import operator
from typing import NoReturn

import torch
from torch import fx

from lissom.compiler.ir import fake, printer
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType, format_type
from lissom.errors import VerifyError

_SIZE_FUNCTIONS = {torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite, torch.sym_float, torch.sym_int}
_SIZE_MODULES = {operator.__name__, "_operator", "math", "torch.utils._sympy.functions"}


def verify_structure(program: Program, before: Program | None = None) -> None:
    """Check that the program is well formed: order, names, dialect, types, signature.

    Types are recomputed with fake tensors, except for nodes that are the same in `before` and have arguments of equal types.

    Raises:
        VerifyError: naming the first node at fault, with the lines around it.
    """
    known = {node.name: node for node in before.graph.nodes} if before else {}
    defined: set[fx.Node] = set()
    names: set[str] = set()
    for node in program.graph.nodes:
        if node.name in names:
            _fail(program, node, f"the name '{node.name}' is used twice")
        names.add(node.name)
        for used in node.all_input_nodes:
            if used not in defined:
                _fail(program, node, f"it reads '{used.name}', which is defined later or not at all")
        if node.op == "call_function":
            _check_dialect(program, node)
        if node.op != "output" and not nodes.has_value(node):
            _fail(program, node, "it has no type; make nodes through the editor")
        if node.op == "get_attr":
            _check_weight(program, node)
        elif node.op == "call_function" and not _is_unchanged(node, known.get(node.name)):
            _check_type(program, node, known.get(node.name))
        defined.add(node)
    _check_signature(program, before)


def _is_unchanged(node: fx.Node, old: fx.Node | None) -> bool:
    """True when a call, the types of its arguments and its own type are the same as before."""
    if old is None or node.target != old.target or nodes.value(node) is not nodes.value(old):
        return False
    reads, read = list[object](), list[object]()
    literals = [
        fx.map_arg((call.args, call.kwargs), lambda used, values=values: values.append(nodes.value(used)))
        for call, values in ((node, reads), (old, read))
    ]
    if literals[0] != literals[1] or len(reads) != len(read):
        return False
    pairs = zip(reads, read, strict=True)
    return all(current is previous or fake.description(current) == fake.description(previous) for current, previous in pairs)


def _check_dialect(program: Program, node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        written = str(nodes.operand(node).target) if nodes.is_state_write(node) else None
        if target._schema.is_mutable and written not in program.state:
            _fail(program, node, f"{target} writes to its argument; only buffers listed as state may be written")
        return
    module = getattr(target, "__module__", "")
    if module not in _SIZE_MODULES and target not in _SIZE_FUNCTIONS:
        _fail(program, node, f"{printer.target_text(target)} is no ATen or registered operator and no function of sizes")


def _check_weight(program: Program, node: fx.Node) -> None:
    if not program.has_weight(str(node.target)):
        _fail(program, node, f"the program has no weight '{node.target}'")
    weight, typed = program.weight(str(node.target)), nodes.tensor_type(node)
    actual = TensorType(weight.dtype, tuple(weight.shape), weight.device)
    if actual != typed:
        described = format_type(actual, program.signature.name_of)
        _fail(program, node, f"the weight is {described} but typed {format_type(typed, program.signature.name_of)}")


def _check_type(program: Program, node: fx.Node, old: fx.Node | None) -> None:
    """Retype a call and compare. A type that still comes from the capture may know less of dynamic sizes; it must then be
    right at the example's sizes.
    """
    try:
        again = nodes.type_of(fake.known_call(program.fake_mode, node))
    # The fake implementation of an operator, ours or another library's, may raise anything; the error is kept as the cause.
    except Exception as error:
        _fail(program, node, f"it does not run on its arguments' types: {error}", cause=error)
    recorded = nodes.node_type(node)
    untouched = old is not None and nodes.value(old) is nodes.value(node)
    # A size that depends on values gets a new name each time it is typed.
    new_sizes = torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ())
    loose = untouched or new_sizes or fake.depends_on_values(program.fake_mode, recorded)
    same = fake.same_at_example if loose else fake.same_type
    if not same(program.fake_mode, again, recorded):
        name_of = program.signature.name_of
        _fail(program, node, f"it yields {format_type(again, name_of)} but is typed {format_type(recorded, name_of)}")


def _check_signature(program: Program, before: Program | None) -> None:
    inputs, arguments = program.placeholders, program.signature.tensors
    if len(inputs) != len(arguments):
        raise VerifyError(f"the program has {len(inputs)} inputs but its signature names {len(arguments)}")
    for node, argument in zip(inputs, arguments, strict=True):
        if not fake.same_type(program.fake_mode, nodes.node_type(node), argument.type):
            described = format_type(argument.type, program.signature.name_of)
            _fail(program, node, f"the signature says {described}")
    if before is None or before.signature is not program.signature:
        return
    old, new = _output_types(before), _output_types(program)
    if len(old) != len(new):
        raise VerifyError(f"the program had {len(old)} outputs and has {len(new)} now; a pass keeps the outputs")
    for index, (wanted, actual) in enumerate(zip(old, new, strict=True)):
        if not fake.same_type(program.fake_mode, wanted, actual):
            name_of = program.signature.name_of
            was, now = format_type(wanted, name_of), format_type(actual, name_of)
            raise VerifyError(f"output {index} was {was} and is now {now}; a pass keeps the outputs' types")


def _output_types(program: Program) -> list[nodes.ValueType]:
    return [nodes.node_type(leaf) if isinstance(leaf, fx.Node) else None for leaf in program.leaves]


def _fail(program: Program, node: fx.Node, reason: str, cause: Exception | None = None) -> NoReturn:
    raise VerifyError(f"{printer.place(program, node)}: {reason}\n{printer.excerpt(program, node)}") from cause


def require_kept_form(before: Program, after: Program) -> None:
    """Check that training changed the values of weights and nothing else: the graph, and the zeros of matrices, are the same.

    Raises:
        VerifyError: naming the first difference.
    """
    if before.text() != after.text():
        changed = printer.unified_diff(before.text(), after.text(), "before", "after").splitlines()
        shown = next((line for line in changed if line[:1] in "+-" and line[:3] not in ("+++", "---")), "")
        raise VerifyError(
            f"a training pass changes the values of weights, and this one changed the program: {shown[1:].strip()}"
        )
    for name, old in before.weights().items():
        new = after.weight(name)
        if old.dim() > 1 and old.is_floating_point() and old is not new and bool((new[old == 0] != 0).any()):
            raise VerifyError(
                f"a training pass must keep the zeros of pruned matrices, and '{name}' has other values where it had zeros"
            )
