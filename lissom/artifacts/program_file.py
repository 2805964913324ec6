"""A program as JSON and back: nodes, types, origins, signature and state; the weights are in a separate file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import sympy
import torch
from torch import fx, nn

from lissom.artifacts.calls import check_call
from lissom.artifacts.expression import decode_expression, encode_expression
from lissom.artifacts.nesting import decode_nesting, encode_nesting
from lissom.artifacts.operators import find_operator, operator_name
from lissom.artifacts.values import Reader, decode_argument, decode_value, encode_argument, encode_type, encode_value
from lissom.artifacts.vocabulary import decode_vocabulary, encode_vocabulary
from lissom.artifacts.weights import Place, check_memory
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.fake import FlatModule, SymbolFact
from lissom.compiler.ir.node import Origin
from lissom.compiler.ir.operators import STATE_WRITES
from lissom.compiler.ir.placement import Placed, Span, Spans
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Argument, ConstantArgument, Dimension, Leaf, Signature, TensorArgument
from lissom.compiler.ir.types import TensorType, ValueType
from lissom.io.fields import (
    count,
    fields_of,
    number,
    optional,
    printable,
    shown,
    take,
    take_list,
    take_optional,
    take_text,
    text,
)

ReadWeights = Callable[[Mapping[str, object], Place], Mapping[str, torch.Tensor]]
MOST_NODES = 1_000_000
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MODULE, _INNER = FlatModule({}, fx.Graph()), nn.Module()
"""Modules without weights: a weight must not have the name of one of their attributes."""


def encode_program(program: Program, weights: Mapping[str, object]) -> dict[str, object]:
    """The program as JSON.

    Args:
        weights: the entries from `save_weights`.

    Raises:
        ArtifactError: for a program that an artifact cannot hold.
    """
    return {
        "name": program.name,
        "symbols": _encode_symbols(program),
        "signature": _encode_signature(program.signature),
        "state": list(program.state),
        "weights": dict(weights),
        **({} if program.vocabulary is None else {"vocabulary": encode_vocabulary(program.vocabulary)}),
        "nodes": [_encode_node(node) for node in program.graph.nodes],
    }


def decode_program(data: object, read_weights: ReadWeights, place: Place) -> Program:
    """The program from JSON.

    Args:
        read_weights: reads the weights by their entries.

    Raises:
        ValueError: for anything `encode_program` does not write.
        TypeError: likewise.
        RuntimeError: likewise.
    """
    facts = _decode_symbols(take(data, "symbols", dict))
    made: dict[str, fx.Node] = {}
    reader = Reader({symbol.name: symbol for symbol in facts}, made, place)
    signature = _decode_signature(take(data, "signature", dict), reader)
    mode = cache(partial(fake.symbolic_mode, facts, signature.conditions))
    state = take_list(data, "state", text)
    stored = take(data, "weights", dict)
    weights = dict(read_weights(stored, place))
    for name in weights:
        check_weight_name(name)
    weights |= _own_state(state, weights, stored)
    entries = take(data, "nodes", list)
    if len(entries) > MOST_NODES:
        raise ValueError(f"the program has {len(entries)} nodes; the limit is {MOST_NODES}")
    graph = fx.Graph()
    for entry in entries:
        node = _decode_node(graph, entry, reader)
        if node.name != take(entry, "name", str) or node.name in made:
            raise ValueError(f"{shown(entry)} has no name a node can have")
        if node.op != "output":
            nodes.set_value(node, decode_value(fields_of(entry).get("type"), reader, mode))
        if node.op == "get_attr":
            _check_weight(str(node.target), weights, nodes.node_type(node))
        if _yields_tensor(node) and not nodes.is_tensor(node):
            raise ValueError(f"{shown(node.name)} has not the type of a tensor, which its operator yields")
        made[node.name] = node
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    unread = next((name for name in state if name not in read), None)
    if unread is not None:
        raise ValueError(f"no node reads the state {shown(unread)}")
    program = Program(
        printable(take(data, "name", str)), FlatModule({name: weights[name] for name in read}, graph), signature, state
    )
    _check_form(program)
    program.vocabulary = optional(data, "vocabulary", decode_vocabulary)
    return program


def _yields_tensor(node: fx.Node) -> bool:
    """True for a call of an operator that yields one tensor."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and [str(returned.type) for returned in schema.returns] == ["Tensor"]


def check_weight_name(name: str) -> None:
    """Refuse a name that is already an attribute of a module, or that would end a string in source generated from a graph."""
    first, *others = printable(name).split(".")
    is_attribute = hasattr(_MODULE, first) or any(hasattr(_INNER, part) for part in others)
    if is_attribute or any(part.startswith("__") or not part for part in (first, *others)) or {*name} & {'"', "'", "\\"}:
        raise ValueError(f"{shown(name)} is not a name for a weight")


def _own_state(
    state: Sequence[str], weights: Mapping[str, torch.Tensor], entries: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    """The state, which the program writes, in memory that neither the file nor another weight shares.

    Args:
        entries: how the weights are stored. What was compressed is in memory of its own already.

    Raises:
        ValueError: if they do not fit in memory.
    """
    absent = next((name for name in state if name not in weights), None)
    if absent is not None:
        raise ValueError(f"there is no weight for the state {shown(absent)}")
    # One copy here, and one in the backend's executable.
    check_memory(2 * sum(weights[name].nbytes for name in {*state}), "the state")
    tensors = Counter(take(entry, "tensor", str) for entry in entries.values())

    def is_own(name: str) -> bool:
        fields = fields_of(entries.get(name, {}))
        return "nonzero" in fields and not {"shape", "trainable"} & {*fields} and tensors[take(fields, "tensor", str)] == 1

    return {name: weights[name] if is_own(name) else weights[name].clone() for name in state}


def _check_weight(name: str, weights: Mapping[str, torch.Tensor], typed: ValueType) -> None:
    if name not in weights:
        raise ValueError(f"there is no weight {shown(name)}")
    weight = weights[name]
    if TensorType(weight.dtype, tuple(weight.shape), weight.device) != typed:
        raise ValueError(f"weight {shown(name)} is {weight.dtype} {list(weight.shape)}, and typed {typed}")


def _check_form(program: Program) -> None:
    last = next(iter(reversed(program.graph.nodes)), None)
    if last is None or [node for node in program.graph.nodes if node.op == "output"] != [last]:
        raise ValueError("the program does not end in its outputs")
    if [nodes.node_type(node) for node in program.placeholders] != [leaf.type for leaf in program.signature.tensors]:
        raise ValueError("the program's inputs are not those of its signature")
    if len(program.leaves) != program.signature.out_spec.num_leaves:
        raise ValueError("the program's outputs are not those of its signature")
    check_writes(program)


def check_writes(program: Program) -> None:
    """Refuse a program that writes to what is not its state. Raises ValueError."""
    for node in program.nodes(*STATE_WRITES):
        if not nodes.is_state_write(node) or str(nodes.operand(node).target) not in program.state:
            raise ValueError(f"'{node.name}' writes to a buffer that is not state of the program")


def _encode_symbols(program: Program) -> dict[str, object]:
    values = [nodes.value(node) for node in program.graph.nodes if nodes.has_value(node)]
    free_symbols = {symbol for value in values for size in _sizes(value) for symbol in size.free_symbols}
    signature = program.signature
    free_symbols |= {
        symbol for leaf in signature.tensors for size in leaf.type.shape for symbol in sympy.sympify(size).free_symbols
    }
    free_symbols |= {symbol for condition in signature.conditions for symbol in condition.free_symbols} | {
        *signature.dimensions
    }
    symbols = sorted((symbol for symbol in free_symbols if isinstance(symbol, sympy.Symbol)), key=lambda symbol: symbol.name)
    return {
        symbol.name: {
            "integer": bool(symbol.is_integer),
            "positive": bool(symbol.is_positive),
            "example": fact.hint,
            "minimum": fact.minimum,
            "maximum": fact.maximum,
        }
        for symbol, fact in fake.symbol_facts(program.fake_mode, symbols).items()
    }


def _sizes(value: object) -> list[sympy.Basic]:
    """The symbolic sizes and scalars in a node's value."""
    if isinstance(value, torch.Tensor):
        return [size.node.expr for size in (*value.shape, *value.stride()) if isinstance(size, torch.SymInt)]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return [value.node.expr]
    return [size for element in value for size in _sizes(element)] if isinstance(value, (tuple, list)) else []


def _decode_symbols(data: Mapping[str, object]) -> dict[sympy.Symbol, SymbolFact]:
    facts: dict[sympy.Symbol, SymbolFact] = {}
    for name, entry in data.items():
        if _SYMBOL.fullmatch(name) is None:
            raise ValueError(f"{shown(name)} is not a name for a symbol")
        # Only true assumptions are passed: for sympy `positive=False` is different from no assumption.
        assumptions = {key: True for key in ("integer", "positive") if take(entry, key, bool)}
        example, minimum, maximum = (take_optional(entry, key, int) for key in ("example", "minimum", "maximum"))
        known = [number for number in (minimum, example, maximum) if number is not None]
        if known != sorted(known):
            raise ValueError(f"the symbol {name} is {example}, and is to be from {minimum} to {maximum}")
        facts[sympy.Symbol(name, **assumptions)] = SymbolFact(example, minimum, maximum)
    return facts


def _encode_signature(signature: Signature) -> dict[str, object]:
    return {
        "positional": [_encode_argument(argument) for argument in signature.positional],
        "keyword": [_encode_argument(argument) for argument in signature.keyword],
        "parameters": list(signature.parameters),
        "returns": encode_nesting(signature.out_spec, "what the model returns"),
        "dimensions": [
            {"symbol": symbol.name, "name": dimension.name, "minimum": dimension.minimum, "maximum": dimension.maximum}
            for symbol, dimension in signature.dimensions.items()
        ],
        "conditions": [encode_expression(condition) for condition in signature.conditions],
    }


def _decode_signature(data: object, reader: Reader) -> Signature:
    dimensions: dict[sympy.Symbol, Dimension] = {}
    for entry in take(data, "dimensions", list):
        maximum = take_optional(entry, "maximum", int)
        symbol, minimum = reader.symbol(take(entry, "symbol", str)), count(take(entry, "minimum", int))
        if maximum is not None and maximum < minimum:
            raise ValueError(f"the dimension {symbol} is to be from {minimum} to {maximum}")
        dimensions[symbol] = Dimension(printable(take(entry, "name", str)), minimum, maximum)
    signature = Signature(
        positional=take_list(data, "positional", lambda argument: _decode_argument(argument, reader)),
        keyword=take_list(data, "keyword", lambda argument: _decode_argument(argument, reader)),
        parameters=take_list(data, "parameters", printable),
        out_spec=decode_nesting(fields_of(data).get("returns")),
        dimensions=dimensions,
        conditions=take_list(data, "conditions", lambda condition: decode_expression(condition, reader.symbols)),
    )
    _check_dimensions(signature)
    return signature


def _check_dimensions(signature: Signature) -> None:
    """Refuse argument sizes that a call does not determine: without a dimension, or computed from sizes no argument has."""
    sizes = [(leaf, size) for leaf in signature.tensors for size in leaf.type.shape if isinstance(size, sympy.Basic)]
    told = {size for _, size in sizes if isinstance(size, sympy.Symbol)}
    for leaf, size in sizes:
        if not size.free_symbols <= told or (isinstance(size, sympy.Symbol) and size not in signature.dimensions):
            raise ValueError(f"argument {shown(leaf.path)} has a size {shown(size)} that no dimension defines")
    names = [argument.name for argument in (*signature.positional, *signature.keyword)]
    if len({*names}) < len(names):
        raise ValueError(f"two arguments of {shown(names)} have one name")


def _encode_argument(argument: Argument) -> dict[str, object]:
    leaves = [
        {"path": leaf.path, "type": encode_type(leaf.type)}
        if isinstance(leaf, TensorArgument)
        else {"path": leaf.path, "value": encode_argument(leaf.value)}
        for leaf in argument.leaves
    ]
    return {"name": argument.name, "nesting": encode_nesting(argument.spec, f"argument '{argument.name}'"), "leaves": leaves}


def _decode_argument(data: object, reader: Reader) -> Argument:
    spec = decode_nesting(fields_of(data).get("nesting"))
    leaves = take_list(data, "leaves", lambda leaf: _decode_leaf(leaf, reader))
    if spec.num_leaves != len(leaves):
        raise ValueError(
            f"argument {shown(take(data, 'name', str))} has {len(leaves)} leaves, and places for {spec.num_leaves}"
        )
    return Argument(printable(take(data, "name", str)), spec, leaves)


def _decode_leaf(data: object, reader: Reader) -> Leaf:
    path, fields = printable(take(data, "path", str)), fields_of(data)
    if "type" in fields:
        return TensorArgument(path, reader.tensor_type(fields["type"]))
    return ConstantArgument(path, decode_argument(fields.get("value")))


def _encode_node(node: fx.Node) -> dict[str, object]:
    if node.op == "output":
        return {"op": node.op, "name": node.name, "args": encode_argument(list(nodes.leaves(node)))}
    data: dict[str, object] = {"op": node.op, "name": node.name}
    if node.op == "get_attr":
        data["target"] = str(node.target)
    elif node.op == "call_function":
        kwargs = {key: encode_argument(argument) for key, argument in node.kwargs.items()}
        data |= {"target": operator_name(node.target), "args": encode_argument(list(node.args)), "kwargs": kwargs}
    origin, placed = {key: value for key, value in vars(nodes.origin(node)).items() if value}, nodes.placed(node)
    further = {"origin": origin} if origin else {}
    further |= {} if placed is None else {"placed": _encode_placed(placed)}
    return data | {"type": encode_value(nodes.value(node)), **further}


def _decode_node(graph: fx.Graph, data: object, reader: Reader) -> fx.Node:
    op, name = take(data, "op", str), take(data, "name", str)
    if op == "output":
        return graph.create_node("output", "output", (tuple(decode_argument(take(data, "args", list), reader)),), name=name)
    if op == "placeholder":
        node = graph.create_node(op, name, name=name)
    elif op == "get_attr":
        node = graph.create_node(op, take(data, "target", str), name=name)
    elif op == "call_function":
        args = tuple(decode_argument(take(data, "args", list), reader))
        kwargs: dict[str, Any] = {
            key: decode_argument(argument, reader) for key, argument in take(data, "kwargs", dict).items()
        }
        target = find_operator(take(data, "target", str))
        check_call(target, args, kwargs)
        node = graph.create_node(op, target, args, kwargs, name=name)
    else:
        raise ValueError(f"{shown(op)} is not a kind of node")
    fields = fields_of(data)
    if "origin" in fields:
        nodes.set_origin(node, _decode_origin(fields["origin"]))
    if "placed" in fields:
        nodes.set_placed(node, _decode_placed(fields["placed"], reader))
    return node


def _decode_origin(data: object) -> Origin:
    texts = {key: take_text(data, key) for key in ("module_path", "source", "code", "replaces")}
    passes = take_list(data, "passes", text) if "passes" in fields_of(data) else ()
    return Origin(**texts, passes=passes)


def _encode_placed(placed: Placed | tuple[Placed, ...]) -> object:
    """The placement of a value, or of several, as JSON; dynamic sizes are expressions."""
    if isinstance(placed, tuple):
        return [_encode_placed(element) for element in placed]
    dims = [{"dim": dim, "spans": [_encode_span(span) for span in spans]} for dim, spans in placed.dims]
    return {"dims": dims, "partial": placed.partial}


def _decode_placed(data: object, reader: Reader) -> Placed | tuple[Placed, ...]:
    """The placement from JSON. Raises ValueError for anything `_encode_placed` does not write."""
    if isinstance(data, list):
        return tuple(_decode_one_placed(entry, reader) for entry in data)
    return _decode_one_placed(data, reader)


def _decode_one_placed(data: object, reader: Reader) -> Placed:
    def dim(entry: object) -> tuple[int, Spans]:
        return number(take(entry, "dim", int)), take_list(entry, "spans", lambda span: _decode_span(span, reader))

    return Placed(take_list(data, "dims", dim), take(data, "partial", bool))


def _encode_span(span: Span) -> dict[str, object]:
    sizes = {key: encode_expression(size) for key, size in (("outer", span.outer), ("size", span.size), ("inner", span.inner))}
    return {**sizes, "parts": span.parts, "every": span.every}


def _decode_span(data: object, reader: Reader) -> Span:
    outer, size, inner = (reader.size(fields_of(data)[key]) for key in ("outer", "size", "inner"))
    return Span(outer, size, inner, take(data, "parts", int), take(data, "every", int))
