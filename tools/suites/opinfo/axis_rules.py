"""Axis rules: without some indices of an axis in the arguments, the results lack these indices and are otherwise unchanged."""

from __future__ import annotations

import random
from typing import cast

import torch

from lissom.compiler.analysis.axes import rules
from lissom.compiler.analysis.axes.axes import Axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import Value, fresh
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.dimensions import contradiction, named
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LIKE, is_pointwise
from lissom.compiler.transforms.removal.indices import mask, remove_indices
from lissom.compiler.verify.divergence import TOLERANCE, relative_error
from lissom.errors import UnsupportedError
from tools.suites.opinfo.calls import Call, OneCall, program_of, run


def has_axis_rule(one: OneCall) -> bool:
    """True when the operator has an axis rule."""
    return one.call.target in rules.RULES or is_pointwise(one.call) or one.call.target in LIKE or named(one.call) is not None


def check_axes(call: Call, generator: random.Random) -> str:
    """The fault of the axis rule of a call; empty if it is right, or claims nothing."""
    one = program_of(call)
    assert one is not None
    if wrong := contradiction(one.call):
        return wrong
    axes = _axes(one)
    atoms = dict.fromkeys(atom for node in one.weights for axis in _dims(axes, node) for atom in axis.atoms())
    for number, atom in enumerate(atoms):
        if not axes.obstacle(atom, zero=True) and cast(int, atom.size) > 1:
            removed = generator.sample(range(cast(int, atom.size)), generator.randrange(1, cast(int, atom.size)))
            if problem := _check_removal(call, number, sorted(removed)):
                return problem
    return ""


def _axes(one: OneCall) -> Axes:
    """The axes of a call whose arguments have axes of their own."""
    of: dict[torch.fx.Node, Value] = {node: fresh(nodes.node_type(node)) for node in one.weights}
    of[one.call] = rules.apply(one.call, of)
    for result in one.results:
        if result is not one.call:
            of[result] = rules.apply(result, of)
    return Axes(of)


def _dims(axes: Axes, node: torch.fx.Node) -> list[Axis]:
    return [cast(Axis, axis).find() for axis in axes.of[node]]


def _check_removal(call: Call, number: int, removed: list[int]) -> str:
    """Remove indices of the axis of this number from a new program of the call, and compare."""
    one = program_of(call)
    assert one is not None
    axes = _axes(one)
    atom = list(dict.fromkeys(atom for node in one.weights for axis in _dims(axes, node) for atom in axis.atoms()))[number]
    kept = torch.ones(cast(int, atom.size), dtype=torch.bool)
    kept[removed] = False
    keep = {atom: kept}
    in_results = all(any(atom in axis.atoms() for axis in _dims(axes, result)) for result in one.results)
    if atom.normed or not in_results:
        # What is summed over, or normed, may lose indices at which it is zero.
        for node in one.weights:
            one.program.set_weight(str(node.target), _zeroed(one.program.weight(str(node.target)), _dims(axes, node), keep))
    wanted = [_left(value, _dims(axes, result), keep) for value, result in zip(run(one), one.results, strict=True)]
    claim = f"{call} without {removed} of an axis of size {atom.size}"
    try:
        remove_indices(Editor(one.program, "remove"), {atom: removed}, axes, zero=True)
        left = run(one)
    except UnsupportedError:
        return ""
    except Exception as error:
        return f"{claim}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    for index, (value, other) in enumerate(zip(wanted, left, strict=True)):
        if value.shape != other.shape:
            return f"{claim}: result {index} is {list(other.shape)}, and {list(value.shape)} is claimed"
        if (error := relative_error(value, other)) > TOLERANCE[torch.float32]:
            return f"{claim}: result {index} differs by {error:.2g}"
    return ""


def _zeroed(weight: torch.Tensor, dims: list[Axis], keep: dict[Axis, torch.Tensor]) -> torch.Tensor:
    for dim, axis in enumerate(dims):
        if not keep.keys().isdisjoint(axis.atoms()):
            weight = weight.index_fill(dim, (~mask(axis, keep)).nonzero().flatten(), 0)
    return weight


def _left(value: torch.Tensor, dims: list[Axis], keep: dict[Axis, torch.Tensor]) -> torch.Tensor:
    for dim, axis in enumerate(dims):
        if not keep.keys().isdisjoint(axis.atoms()):
            value = value.index_select(dim, mask(axis, keep).nonzero().flatten())
    return value
