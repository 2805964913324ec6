"""Rewrite `einsum` of two operands as a matrix product between permutations.

    einsum("bihd,bjhd->bhij", q, k) = matmul(permute(q, b h i d), permute(k, b h d j))

Letters in both operands and the result are batch, letters in both but not in the result are contracted, the others are rows and
columns. Other passes recognize attention and linear layers by `matmul`. Left alone: a single operand, repeated letters,
ellipses, and letters summed over in one operand only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.cost import example_shape
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Einsum
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class _Letters:
    """The letters of an equation of two operands, by kind."""

    left: str
    right: str
    result: str
    batch: str
    rows: str
    contracted: str
    columns: str


@dataclass(frozen=True)
class RewriteEinsum(Rewrite):
    """Replaces `einsum` by `matmul` between permutations."""

    def run(self, edit: Editor) -> None:
        pairs = [part for node in edit.nodes(aten.einsum.default) for part in _in_pairs(edit, node)]
        for node in pairs:
            equation, operands = Einsum(node).equation, Einsum(node).tensors
            letters = parse(equation) if len(operands) == 2 else None
            if letters is None:
                edit.skip(node, f"'{equation}' is no product of two operands")
                continue
            left, right = operands
            others = _varies(left, letters.left, letters.rows) or _varies(right, letters.right, letters.columns)
            terms = ((left, letters.left), (right, letters.right))
            if others and any(_varies(operand, term, letters.contracted) for operand, term in terms):
                edit.skip(node, f"'{equation}' folds two sizes that vary")
                continue
            if any(_is_one(operand, term, letters.batch) for operand, term in terms):
                edit.skip(
                    node, f"'{equation}' has a size that varies and is 1 in the example, where PyTorch types products as 1"
                )
                continue
            with edit.before(node):
                rewritten = _product(edit, operands, letters)
            edit.replace(node, rewritten)


def _in_pairs(edit: Editor, node: fx.Node) -> list[fx.Node]:
    """An einsum of several operands as einsums of two, from left to right as in PyTorch; any other node unchanged.

    Each keeps the letters that the remaining operands and the result need.
    """
    operands = Einsum(node).tensors
    inputs, arrow, result = Einsum(node).equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(operands) < 3 or not arrow or not "".join((*terms, result)).isalpha():
        return [node]
    parts: list[fx.Node] = []
    product, letters = operands[0], terms[0]
    with edit.before(node):
        for index in range(1, len(operands)):
            needed = "".join((result, *terms[index + 1 :]))
            left = "".join(letter for letter in dict.fromkeys(letters + terms[index]) if letter in needed)
            left = result if index == len(operands) - 1 else left
            product = edit.call(aten.einsum.default, f"{letters},{terms[index]}->{left}", [product, operands[index]])
            parts.append(product)
            letters = left
    edit.replace(node, product)
    return parts


def parse(equation: str) -> _Letters | None:
    """The letters of an equation of two operands; None when it is no matrix product."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    left, comma, right = inputs.partition(",")
    if not arrow or not comma or not (left + right + result).isalpha():
        return None
    if any(len(set(term)) != len(term) for term in (left, right, result)) or set(result) - set(left + right):
        return None
    shared = [letter for letter in left if letter in right]
    rows = "".join(letter for letter in left if letter not in right)
    columns = "".join(letter for letter in right if letter not in left)
    if set(rows + columns) - set(result):
        return None
    batch = "".join(letter for letter in shared if letter in result)
    contracted = "".join(letter for letter in shared if letter not in result)
    return _Letters(left, right, result, batch, rows, contracted, columns)


def _varies(operand: fx.Node, term: str, group: str) -> bool:
    """True if a group of several letters has a dynamic size, so that flattening it takes the one -1 of a reshape."""
    shape = nodes.tensor_type(operand).shape
    return len(group) != 1 and any(not isinstance(shape[term.index(letter)], int) for letter in group)


def _is_one(operand: fx.Node, term: str, group: str) -> bool:
    """True if a letter of the group has a dynamic size that is 1 in the example."""
    shape, sizes = nodes.tensor_type(operand).shape, example_shape(operand)
    return any(not isinstance(shape[dim], int) and sizes[dim] == 1 for dim in map(term.index, group))


def _product(edit: Editor, operands: Sequence[fx.Node], letters: _Letters) -> fx.Node:
    sizes: dict[str, fx.Node | int] = {}
    for operand, term in zip(operands, (letters.left, letters.right), strict=True):
        for dim, letter in enumerate(term):
            size = edit.size(operand, dim)
            if letter not in sizes or size != 1:  # a size of 1 broadcasts
                sizes[letter] = size
    left, right = (
        _expanded(edit, operand, term, sizes) for operand, term in zip(operands, (letters.left, letters.right), strict=True)
    )
    left = _arranged(edit, left, letters.left, letters.batch, letters.rows, letters.contracted, sizes)
    right = _arranged(edit, right, letters.right, letters.batch, letters.contracted, letters.columns, sizes)
    product = edit.call(aten.matmul.default, left, right)
    order = letters.batch + letters.rows + letters.columns
    if len(letters.rows) != 1 or len(letters.columns) != 1:
        product = edit.call(aten.reshape.default, product, [sizes[letter] for letter in order])
    return _permuted(edit, product, order, letters.result)


def _expanded(edit: Editor, operand: fx.Node, term: str, sizes: dict[str, fx.Node | int]) -> fx.Node:
    """The operand with its sizes of 1 expanded to those of the other operand, as `einsum` broadcasts them."""
    pairs = zip(nodes.tensor_type(operand).shape, (sizes[letter] for letter in term), strict=True)
    if all(own != 1 or size == 1 for own, size in pairs):
        return operand
    return edit.call(aten.expand.default, operand, [sizes[letter] for letter in term])


def _arranged(
    edit: Editor, operand: fx.Node, term: str, batch: str, first: str, second: str, sizes: dict[str, fx.Node | int]
) -> fx.Node:
    """An operand as [*batch, first, second], each of the two groups flattened into one dimension."""
    permuted = _permuted(edit, operand, term, batch + first + second)
    if len(first) == len(second) == 1:
        return permuted
    shape = [sizes[letter] for letter in batch]
    for group in (first, second):
        held = [sizes[letter] for letter in group]
        fixed = [size for size in held if isinstance(size, int)]
        shape.append(held[0] if len(held) == 1 else math.prod(fixed) if len(fixed) == len(held) else -1)
    return edit.call(aten.reshape.default, permuted, shape)


def _permuted(edit: Editor, operand: fx.Node, term: str, order: str) -> fx.Node:
    return operand if term == order else edit.call(aten.permute.default, operand, [term.index(letter) for letter in order])
