"""Raise rotary position embedding written as separate operators to `lissom::rotary`.

    (a, b) -> (a · cos − b · sin, b · cos + a · sin)                Su et al. 2021 (RoFormer), eq. 34

Recognized forms: x · cos + rotated(x) · sin, where rotated(x) swaps the halves of the features (GPT-NeoX, Llama) or neighbours
(GPT-J, RoFormer) with a minus sign; both results computed separately and concatenated (GPT-OSS); and the product of complex
numbers (Llama 4, DeepSeek). A model that rotates only some of its features keeps its slices around the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.formula import Formula, Match
from lissom.compiler.ir.operators import PARTS, RESHAPES, SAME_VALUES
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.ops import rotary

aten = torch.ops.aten

_MOVES = (*SAME_VALUES, *PARTS, aten.index.Tensor)
"""Operators that move the elements of their first argument and change none."""


_ROTATED = Formula(
    """
    turned = cat([-b, a], -1) | RESHAPES(stack([-b, a], -1), ...)
    minus = a * cos - b * sin
    plus = b * cos + a * sin
    turned * sin + x * cos | cat([minus, plus], -1) | RESHAPES(stack([minus, plus], -1), ...)
    """,
    lambda found: _rotated(found) is not None,
)
_COMPLEX = Formula(
    """
    pairs = RESHAPES(x, ...)
    product = view_as_complex(pairs) * angles
    RESHAPES(view_as_real(product), ...)
    """,
    lambda found: nodes.node_type(found["x"]) == nodes.node_type(found.root) and _are_pairs(found["pairs"], found["x"]),
)
_PART = Formula(
    """
    pairs = RESHAPES(x, ...)
    slice(x, -1, start | None, end | None, step) | SPLITS(x, sizes, -1)[index] | unbind(pairs, -1)[index]
    """,
    **dict.fromkeys(("start", "end", "step", "index"), int),
    sizes=object,
)


@dataclass(frozen=True)
class RaiseRotary(Rewrite):
    """Replaces rotary position embedding written as separate operators by `lissom::rotary`."""

    def run(self, edit: Editor) -> None:
        for rotation in edit.matches(_ROTATED):
            x, interleaved = rotation.values.get("x") or _rotated(rotation), nodes.is_call(_joined(rotation), *RESHAPES)
            with edit.before(rotation.root, like=[rotation.root]):
                raised = edit.call(rotary, x, rotation["cos"], rotation["sin"], interleaved=interleaved)
            if nodes.node_type(raised) == nodes.node_type(rotation.root):
                edit.replace(rotation.root, raised)
            else:
                edit.program.graph.erase_node(raised)
        for rotation in edit.matches(_COMPLEX):
            with edit.before(rotation.root, like=[rotation["product"], rotation.root]):
                cos, sin = _real_and_imaginary(edit, rotation["angles"])
                raised = edit.call(rotary, rotation["x"], cos, sin, interleaved=True)
            edit.replace(rotation.root, raised)


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


def _rotated(found: Match) -> fx.Node | None:
    """The x of x · cos + rotated(x) · sin, with an angle per feature, or of both results joined, with one per pair."""
    joined, first, second = _joined(found), _part(found["a"]), _part(found["b"])
    if first is None or second is None or first[0] is not second[0]:
        return None
    x = first[0]
    width = nodes.fixed_size(x, -1)
    half, features = width // 2, range(width)
    neighbours = nodes.is_call(joined, *RESHAPES)
    if neighbours and not _are_pairs(nodes.operand(joined), joined):
        return None
    wanted = (features[::2], features[1::2]) if neighbours else (features[:half], features[half:])
    angles = half if "x" not in found.values else width
    tables = [nodes.tensor_type(found[name]) for name in ("cos", "sin")]
    fits = all(table.shape[-1:] == (angles,) and table.rank <= nodes.tensor_type(x).rank for table in tables)
    return x if fits and width % 2 == 0 and (first[1], second[1]) == wanted and found.values.get("x", x) is x else None


def _joined(found: Match) -> fx.Node:
    """The two parts joined: rotated(x), or the result."""
    return found["turned"] if "turned" in found.values else found.root


def _are_pairs(pairs: fx.Node, whole: object) -> bool:
    """True for values [..., n, 2] and [..., 2n]."""
    split, flat = nodes.tensor_type(pairs).shape, nodes.tensor_type(whole).shape
    return split[-1] == 2 and flat == (*split[:-2], split[-2] * 2)


def _part(node: fx.Node) -> tuple[fx.Node, range] | None:
    """The value that a node is some of the features of, and which."""
    found = _PART.match(node)
    width = None if found is None else nodes.tensor_type(found["x"]).shape[-1]
    if found is None or not isinstance(width, int):
        return None
    features, values = range(width), found.values
    if "step" in values:
        bounds = [item if isinstance(item, int) else None for item in map(values.get, ("start", "end", "step"))]
        return found["x"], features[slice(*bounds)]
    index = int(found.number("index"))
    if "pairs" in values:
        return (found["x"], features[index::2]) if _are_pairs(found["pairs"], found["x"]) else None
    count = nodes.tensor_type(node).shape[-1]
    return (found["x"], features[index * count : (index + 1) * count]) if isinstance(count, int) else None
