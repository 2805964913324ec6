"""Remove channels of the residual stream that are always zero.

A channel is dead when all its writers (embeddings, output and down projections, biases) write exactly zero, and all its readers
multiply it, or its normalized value, by zero. It is removed from every weight that has it, tied embeddings included. Norms keep
dividing by the original number of channels n, of which k are left:

    rms_norm:    x / √(Σx²/n + ε) · w  =  x / √(Σx²/k + ε n/k) · w √(n/k)
    layer_norm:  zeros are padded before it and sliced off after it

Outputs of the program get their dead channels back as zeros. Xia et al. 2023 ("Sheared LLaMA"), §2.1, prune the hidden
dimension. Inputs are taken to be finite.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.dead_units import dead_units, zero_units
from lissom.compiler.analysis.axes.zeros import zero_at, zeros
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Matmul, Norm
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LAYER_NORMS
from lissom.compiler.transforms.removal.indices import remove_indices
from lissom.compiler.transforms.removal.norms import normed_axes
from lissom.errors import LissomError

aten = torch.ops.aten


def eliminate_hidden(edit: Editor) -> None:
    """Remove channels of the residual stream that are always zero."""
    held = list(_hold_outputs(edit))
    chosen: dict[Axis, list[int]] = {}
    places: dict[Axis, fx.Node] = {}
    program_axes = edit.program.fact(axes)
    for axis, node in _hidden(edit).items():
        dead = _dead_channels(edit, axis)
        if not bool(dead.any()):
            continue
        if reason := program_axes.obstacle(axis, zero=True):
            edit.skip(node, f"{int(dead.sum())} dead channels stay: {reason}")
        else:
            chosen[axis], places[axis] = dead.nonzero().flatten().tolist(), node
    if chosen:
        try:
            remove_indices(edit, chosen, zero=True)
        except LissomError as error:
            for node in places.values():
                edit.skip(node, f"dead channels stay: {error}")
    _release_outputs(edit, held)


def _hidden(edit: Editor) -> dict[Axis, fx.Node]:
    """The axes of the residual stream, each with a residual add that has it."""
    program_axes, sums = edit.program.fact(axes), edit.program.fact(structure).residuals
    return {atom: node for node in reversed(sums) for atom in program_axes.axis(node, -1).atoms() if isinstance(atom.size, int)}


def _dead_channels(edit: Editor, axis: Axis) -> torch.Tensor:
    """The channels that are zero at the input of every norm and contribute to no sum, booleans [size of the axis]."""
    program = edit.program
    program_axes, zero = program.fact(axes), program.fact(zeros)
    dead = dead_units(program, (axis,))
    for node in program.nodes(*LAYER_NORMS):
        if any(axis in set(other.atoms()) for other in normed_axes(node, program_axes)):
            dead &= zero_units(program_axes, zero, (Norm(node).x, -1), (axis,))
    if bool(dead.all()):
        dead[0] = False
    return dead


def _hold_outputs(edit: Editor) -> Iterator[fx.Node]:
    """Multiply outputs with dead channels by the identity: removing channels removes its rows, and its columns stay."""
    program = edit.program
    zero = program.fact(zeros)
    for node in list(program.output.all_input_nodes):
        typed = nodes.tensor_type(node) if nodes.is_tensor(node) else None
        size = typed.shape[-1] if typed is not None and typed.rank > 1 and typed.dtype.is_floating_point else None
        if typed is None or not isinstance(size, int) or not bool(zero_at(zero, node, -1).any()):
            continue
        with edit.before(program.output):
            identity = edit.weight(f"{node.name}.channels", torch.eye(size, dtype=typed.dtype, device=typed.device))
            whole = edit.call(aten.matmul.default, node, identity)
        program.output.replace_input_with(node, whole)
        yield whole


def _release_outputs(edit: Editor, held: list[fx.Node]) -> None:
    """Replace these products by padding that puts zeros at the removed channels."""
    for whole in held:
        value, chosen = Matmul(whole).x, Matmul(whole).y
        rows = edit.tensor(chosen).cpu()
        if rows.shape[0] < rows.shape[1]:
            # The channel of each output column; the padded zero where it was removed.
            source = torch.where(rows.any(0), rows.argmax(0), rows.shape[0])
            with edit.before(whole):
                numbers = edit.weight(f"{value.name}.restored", source.to(nodes.tensor_type(value).device))
                padded = edit.call(aten.constant_pad_nd.default, value, [0, 1])
                value = edit.call(aten.index_select.default, padded, nodes.tensor_type(value).rank - 1, numbers)
        edit.replace(whole, value)
        edit.rewritten -= 1
