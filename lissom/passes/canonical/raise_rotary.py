"""Raise rotary position embedding written as separate operators to `lissom::rotary`.

    (a, b) -> (a · cos − b · sin, b · cos + a · sin)                Su et al. 2021 (RoFormer), eq. 34

Recognized forms: x · cos + rotated(x) · sin, where rotated(x) swaps the halves of the features (GPT-NeoX, Llama) or neighbours
(GPT-J, RoFormer) with a minus sign; both results computed separately and concatenated (GPT-OSS); and the product of complex
numbers (Llama 4, DeepSeek). A model that rotates only some of its features keeps its slices around the operator.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Binary
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import RESHAPES
from lissom.compiler.ir.view_calls import Cat, Item, Slice, Split, Stack, Unbind
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops import rotary

aten = torch.ops.aten

_FIRST, _SECOND, _EVEN, _ODD = "first half", "second half", "even", "odd"
_MOVES = (*RESHAPES, aten.unsqueeze.default, aten.slice.Tensor, aten.select.int, aten.index.Tensor, aten.transpose.int)
"""Operators that move the elements of their first argument and change none."""


@dataclass(frozen=True)
class _Rotary:
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    interleaved: bool


@dataclass(frozen=True)
class RaiseRotary(Rewrite):
    """Replaces rotary position embedding written as separate operators by `lissom::rotary`."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.add.Tensor):
            self._raise(edit, node, _sum_of_products(node))
        for node in edit.nodes(aten.cat.default, *RESHAPES):
            self._raise(edit, node, _two_results(node))
        for node in edit.nodes(aten.view_as_real.default):
            self._raise_complex(edit, node)

    def _raise(self, edit: Editor, node: fx.Node, rotation: _Rotary | None) -> None:
        if rotation is None or not _broadcasts(rotation):
            return
        with edit.before(node, like=[node]):
            raised = edit.call(rotary, rotation.x, rotation.cos, rotation.sin, interleaved=rotation.interleaved)
        if nodes.node_type(raised) == nodes.node_type(node):
            edit.replace(node, raised)
        else:
            edit.program.graph.erase_node(raised)

    def _raise_complex(self, edit: Editor, node: fx.Node) -> None:
        """view_as_real(view_as_complex(x in pairs) · angles), flattened to the shape of x."""
        product = nodes.operand(node)
        if not nodes.is_call(product, aten.mul.Tensor) or len(node.users) != 1:
            return
        (flattened,) = node.users
        for number, angles in _orders(product):
            if not nodes.is_call(number, aten.view_as_complex.default):
                continue
            pairs = nodes.operand(number)
            if not nodes.is_call(pairs, *RESHAPES) or not nodes.is_call(flattened, *RESHAPES):
                continue
            x = nodes.operand(pairs)
            if nodes.node_type(x) != nodes.node_type(flattened) or not _are_pairs(pairs, x):
                continue
            with edit.before(flattened, like=[product, flattened]):
                cos, sin = _real_and_imaginary(edit, angles)
                raised = edit.call(rotary, x, cos, sin, interleaved=True)
            edit.replace(flattened, raised)
            return


def _real_and_imaginary(edit: Editor, number: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The real and imaginary parts of a complex value; cos and sin of a known angle (few backends have complex)."""
    if nodes.is_call(number, aten.polar.default):
        length, angle = nodes.operand(number), nodes.operand(number, 1)
        parts = edit.call(aten.cos.default, angle), edit.call(aten.sin.default, angle)
        if nodes.is_call(length, aten.ones_like.default):
            return parts
        return edit.call(aten.mul.Tensor, length, parts[0]), edit.call(aten.mul.Tensor, length, parts[1])
    if nodes.is_call(number, aten.complex.default):
        return nodes.operand(number), nodes.operand(number, 1)
    if nodes.is_call(number, *_MOVES):
        first, second = _real_and_imaginary(edit, nodes.operand(number))
        return edit.again(number, first), edit.again(number, second)
    both = edit.call(aten.view_as_real.default, number)
    return edit.call(aten.select.int, both, -1, 0), edit.call(aten.select.int, both, -1, 1)


def _broadcasts(rotation: _Rotary) -> bool:
    """True when cos and sin have one angle per feature, or per pair, and the result has the shape of x."""
    x, cos, sin = (nodes.tensor_type(operand) for operand in (rotation.x, rotation.cos, rotation.sin))
    width = x.shape[-1]
    if not isinstance(width, int) or width % 2 or cos.shape[-1:] != sin.shape[-1:] or max(cos.rank, sin.rank) > x.rank:
        return False
    return cos.rank > 0 and cos.shape[-1] in (width, width // 2)


def _sum_of_products(node: fx.Node) -> _Rotary | None:
    """x · cos + rotated(x) · sin."""
    if node.kwargs:
        return None
    for straight, crossed in (node.args, reversed(node.args)):
        for turned, sin in _orders(crossed):
            rotated = _turned(turned)
            if rotated is None:
                continue
            x, interleaved = rotated
            cos = next((angles for factor, angles in _orders(straight) if factor is x), None)
            if cos is not None and nodes.tensor_type(cos).shape[-1:] == nodes.tensor_type(x).shape[-1:]:
                return _Rotary(x, cos, sin, interleaved)
    return None


def _orders(product: object) -> list[tuple[fx.Node, fx.Node]]:
    """The two factors of a product of tensors, in both orders; nothing for any other value."""
    if not nodes.is_call(product, aten.mul.Tensor):
        return []
    left, right = Binary(product).left, Binary(product).right
    return [(left, right), (right, left)] if nodes.is_tensor(left) and nodes.is_tensor(right) else []


def _turned(node: object) -> tuple[fx.Node, bool] | None:
    """x and whether its pairs are neighbours, when the node replaces each pair (a, b) of x by (−b, a)."""
    parts = _joined(node)
    if parts is None or not nodes.is_call(parts[0], aten.neg.default):
        return None
    pair = _pair(parts[1], nodes.operand(parts[0]))
    return pair if pair is not None and pair[1] == _is_interleaving(node) else None


def _two_results(node: fx.Node) -> _Rotary | None:
    """a · cos − b · sin and b · cos + a · sin, concatenated."""
    parts = _joined(node)
    if parts is None:
        return None
    minus, plus = parts
    if not nodes.is_call(minus, aten.sub.Tensor) or not nodes.is_call(plus, aten.add.Tensor) or minus.kwargs or plus.kwargs:
        return None
    if not all(nodes.is_call(term, aten.mul.Tensor) for term in plus.args):
        return None
    for a, cos in _orders(Binary(minus).left):
        for b, sin in _orders(Binary(minus).right):
            pair = _pair(a, b)
            if pair is None:
                continue
            x, interleaved = pair
            wanted = {frozenset((b, cos)), frozenset((a, sin))}
            same = {frozenset(term.all_input_nodes) for term in plus.all_input_nodes} == wanted
            width = nodes.tensor_type(x).shape[-1]
            half = (width // 2,) if isinstance(width, int) else ()
            one_a_pair = half and all(nodes.tensor_type(table).shape[-1:] == half for table in (cos, sin))
            if same and interleaved == _is_interleaving(node) and one_a_pair:
                return _Rotary(x, cos, sin, interleaved)
    return None


def _joined(node: object) -> tuple[fx.Node, fx.Node] | None:
    """The two parts concatenated or interleaved along the last dimension."""
    joint = Cat(node) if nodes.is_call(node, aten.cat.default) else None
    if nodes.is_call(node, *RESHAPES):
        joint = Stack.of(nodes.operand(node))
        if joint is not None and not _are_pairs(joint.node, node):
            return None
    if joint is None or len(joint.parts) != 2 or joint.dim not in (-1, nodes.tensor_type(joint.node).rank - 1):
        return None
    return joint.parts[0], joint.parts[1]


def _is_interleaving(node: object) -> bool:
    return nodes.is_call(node, *RESHAPES)


def _are_pairs(pairs: fx.Node, whole: object) -> bool:
    """True for values [..., n, 2] and [..., 2n]."""
    split, flat = nodes.tensor_type(pairs).shape, nodes.tensor_type(whole).shape
    return split[-1] == 2 and flat == (*split[:-2], split[-2] * 2)


def _pair(a: object, b: object) -> tuple[fx.Node, bool] | None:
    """x and whether its pairs are neighbours, when a and b are the two parts of x that are rotated together."""
    first, second = _part(a), _part(b)
    if first is None or second is None or first[0] is not second[0]:
        return None
    interleaved = {(_FIRST, _SECOND): False, (_EVEN, _ODD): True}.get((first[1], second[1]))
    return None if interleaved is None else (first[0], interleaved)


def _part(node: object) -> tuple[fx.Node, str] | None:
    """The value that a node is one half of, and which half."""
    if nodes.is_call(node, operator.getitem):
        return _piece(node)
    part = Slice.of(node)
    if part is None:
        return None
    x, start, end = part.x, part.start or 0, part.end
    width = nodes.tensor_type(x).shape[-1]
    if part.dim not in (-1, nodes.tensor_type(x).rank - 1) or not isinstance(width, int) or width % 2:
        return None
    whole = end is None or (isinstance(end, int) and end >= width)
    if not isinstance(start, int):
        return None
    if part.step == 2 and whole and start in (0, 1):
        return x, (_EVEN, _ODD)[start]
    if part.step != 1:
        return None
    if start == 0 and end in (width // 2, -(width - width // 2)):
        return x, _FIRST
    return (x, _SECOND) if start in (width // 2, -(width // 2)) and whole else None


def _piece(node: fx.Node) -> tuple[fx.Node, str] | None:
    """A piece of x.chunk(2, -1), of x.split(half, -1), or of x in pairs, unbound along the pairs."""
    index, source = Item(node).index, Item(node).source
    pieces = Split.of(source) or Unbind.of(source)
    if index not in (0, 1) or pieces is None or pieces.dim not in (-1, nodes.tensor_type(pieces.x).rank - 1):
        return None
    x = pieces.x
    if isinstance(pieces, Unbind):
        if not nodes.is_call(x, *RESHAPES) or not _are_pairs(x, nodes.operand(x)):
            return None
        return nodes.operand(x), _EVEN if index == 0 else _ODD
    half = nodes.tensor_type(node).shape[-1]
    return (x, _FIRST if index == 0 else _SECOND) if nodes.tensor_type(x).shape[-1] == half * 2 else None
