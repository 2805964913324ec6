"""The residual stream in another basis: every weight that writes or reads it is multiplied by one orthogonal matrix Q.

    x' = x Q                    tables, output and down projections, their biases, positions: multiplied by Q
    norm(x') = norm(x) Q        an RMS norm without scale: the size of x' is that of x
    W norm(x) = (W Q) norm(x')  q, k, v, gate, up, the LM head: multiplied by Q

Norms are prepared first. SliceGPT: Ashkboos et al. 2024, §3.1 and §3.2. https://arxiv.org/abs/2401.15024

- A scale and a bias are folded into the layers that read the norm:  W (g ⊙ x̂ + b) = (W diag g) x̂ + W b.
- Where something else reads it, the scale stays as a matrix, which is rotated on both sides:  x̂' (Qᵀ diag(g) Q) + b Q. This is
  the case for norms after a layer (Gemma 2 and 3), for the last norm before an output of hidden states, and before an LM head
  that is tied to the embedding table. It costs a product of the stream's width for each token.
- A LayerNorm of values whose mean is zero is an RMS norm, so what writes to the stream is centred:  W (I - 1 1ᵀ/n). All
  readers must read behind a norm then. A tied LM head gets a matrix of its own.

There is one basis for the whole stream, so shortcuts need no matrices, unlike in SliceGPT. `pca` takes the principal components
of what the layers read, weighted by their matrices, improved for all layers at once: see `bases.principal_components` and
`bases.nested_components`. An embedding table that is the LM head too stays as it is then, between two matrices of the basis,
since the head reads other components than the stream's: those of the last norm times its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.base import of
from lissom.compiler.analysis.structure.linear import input_of, is_linear
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.statistics import moments
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding, Linear, Norm
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import LAYER_NORMS
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import fixed
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops import change_basis
from lissom.passes.quantize.rotate.bases import nested_components, principal_components
from lissom.passes.quantize.rotate.channels import rotation_obstacle, turn
from lissom.passes.quantize.rotate.norms import centring_obstacle, shortcut_obstacle, without_scale

aten = torch.ops.aten


def rotate_residual(edit: Editor, basis_of: Callable[[int], torch.Tensor] | None) -> None:
    """Rotate every residual stream that allows it; the others are reported.

    Args:
        basis_of: an orthogonal matrix of a size, in float64; None for principal components.

    Raises:
        UnsupportedError: when no stream can be rotated, with the reason for the first.
        RequirementError: for principal components without calibration data.
    """
    if basis_of is None and not edit.data:
        raise RequirementError("rotate{basis=pca} needs calibration data: pass data=, or choose basis=hadamard")
    names = [total.name for total in _streams(edit.program).values()]
    if not names:
        raise UnsupportedError("rotate{where=residual} finds no residual stream in this program; leave it out for this model")
    reasons: list[str] = []
    for name in names:
        trial = Editor(edit.program.copy(), edit.pass_name, edit.data)
        reason = _rotate(trial, _named(trial.program, name), basis_of)
        if reason is None:
            edit.program = trial.program
            edit.rewritten += trial.rewritten
            edit.notes += trial.notes
        else:
            total = _named(edit.program, name)
            edit.skip(total, reason)
            reasons.append(
                f"rotate{{where=residual}} cannot rotate the residual stream of {place(edit.program, total)}: {reason}"
            )
    if len(reasons) == len(names):
        raise UnsupportedError(reasons[0])


def _streams(program: Program) -> dict[Axis, fx.Node]:
    """The channel axes of the residual streams, each with a residual add that has it."""
    known, streams = program.fact(axes), dict[Axis, fx.Node]()
    for total in program.fact(structure).residuals:
        streams.setdefault(known.axis(total, -1), total)
    return streams


def _named(program: Program, name: str) -> fx.Node:
    return next(node for node in program.nodes() if node.name == name)


def _rotate(edit: Editor, total: fx.Node, basis_of: Callable[[int], torch.Tensor] | None) -> str | None:
    """Rotate the stream of a residual add, or return the reason why it cannot be rotated; the program may be changed then."""
    stream = edit.program.fact(axes).axis(total, -1)
    if stream.form != "atom" or not isinstance(stream.size, int):
        return "the model folds its channels into other dimensions"
    every, matrices = _norms(edit.program, stream), 0
    if (reason := shortcut_obstacle(edit.program, every)) is not None:
        return reason
    for norm in every:
        edit.current = norm
        kept = without_scale(edit, norm)
        if isinstance(kept, str):
            return kept
        matrices += kept
    if basis_of is None:
        _separate_tables(edit)
    _separate_ends(edit, edit.program.fact(axes).axis(total, -1))
    if basis_of is None:
        _as_layers(edit, total)
    stream = edit.program.fact(axes).axis(total, -1)
    norms = _norms(edit.program, stream)
    centred = any(norm.target is aten.layer_norm.default for norm in norms)
    if centred and (reason := centring_obstacle(edit.program, stream, norms)) is not None:
        return reason
    size = fixed(stream.size)
    basis = basis_of(size) if basis_of is not None else _principal(edit, total, size)
    if basis is None:
        return "no linear layer reads its channels, whose principal components could be chosen; use basis=hadamard"
    for norm in norms:
        if norm.target is aten.layer_norm.default:
            call = Norm(norm)
            edit.replace_by(norm, aten.rms_norm.default, call.x, call.shape, None, call.eps)
    stream = edit.program.fact(axes).axis(total, -1)
    if (reason := rotation_obstacle(edit.program, stream)) is not None:
        return reason
    turn(edit, {stream: basis - basis.mean(0) if centred else basis})
    if matrices:
        edit.note(f"{matrices} of {len(every)} norms keep their scale as a matrix, {size} by {size}")
    return None


def _norms(program: Program, stream: Axis) -> list[fx.Node]:
    """The norms over the channels of a stream."""
    known = program.fact(axes)
    return [node for node in program.nodes(*LAYER_NORMS) if stream in known.axis(Norm(node).x, -1).atoms()]


def _separate_ends(edit: Editor, stream: Axis) -> None:
    """Multiply the program's inputs and outputs on the stream by the identity, which is rotated on one side."""
    known = edit.program.fact(axes)
    output = edit.program.output
    ends = [node for node in (*edit.program.placeholders, *output.all_input_nodes) if node in known.of]
    for node in [node for node in ends if stream in {atom for axis in of(node, known.of)[-1:] for atom in axis.atoms()}]:
        first = edit.program.nodes()[0]
        if node.op == "placeholder":
            _multiply(edit, node, list(node.users), before=first, like=first)
        else:
            _multiply(edit, node, [output], before=output, like=node)
    edit.program.edits += 1


def _multiply(edit: Editor, node: fx.Node, readers: Sequence[fx.Node], *, before: fx.Node, like: fx.Node) -> None:
    """Let readers have a value times the identity, as a weight that can be rotated."""
    typed = nodes.tensor_type(node)
    with edit.before(before, like=[like]):
        identity = torch.eye(fixed(typed.shape[-1]), dtype=typed.dtype, device=typed.device)
        moved = edit.call(change_basis, node, edit.weight(f"{node.name}.basis", identity))
    for reader in readers:
        reader.replace_input_with(node, moved)


def _separate_tables(edit: Editor) -> None:
    """Multiply rows of embedding tables that are LM heads too by the identity, which is rotated in place of the table.

    The head reads a norm times its scale, whose components are others than those of the stream: pruned with the stream, it
    would lose most of what it reads.
    """
    for lookup in edit.program.nodes(*Embedding.targets):
        table = Embedding(lookup).table
        if any(Linear.of(user) is not None and Linear(user).weight is table for user in table.users):
            _multiply(edit, lookup, list(lookup.users), before=lookup.next, like=lookup)
            edit.program.edits += 1


def _as_layers(edit: Editor, total: fx.Node) -> None:
    """Turn matrices that read the stream into linear layers, which `prune-hidden` refits."""
    known = edit.program.fact(axes)
    stream = known.axis(total, -1)
    for node in edit.program.nodes(change_basis):
        if stream not in known.axis(nodes.operand(node), -1).atoms() or stream in known.axis(node, -1).atoms():
            continue
        # The matrix is diagonal, so it is its transpose.
        edit.change_call(node, aten.linear.default, nodes.operand(node), nodes.operand(node, 1))


def _principal(edit: Editor, total: fx.Node, size: int) -> torch.Tensor | None:
    """The basis whose first channels serve the layers that read the stream best, on the calibration data.

    Layers that read several streams side by side do not count. None where no layer reads this one.
    """
    known = edit.program.fact(axes)
    stream = known.axis(total, -1)
    readers = {
        node: matrix
        for node in edit.program.nodes()
        if is_linear(node) and stream == known.axis(input_of(node), -1) and isinstance(matrix := matrix_of(node), Matrix)
    }
    if not readers:
        return None
    sums = moments(edit.program, edit.data, dict.fromkeys(map(input_of, readers)))
    grams = {node: part.gram.double().cpu() * (size / part.gram.trace().clamp_min(1e-30).cpu()) for node, part in sums.items()}
    weights = {node: torch.zeros(size, size, dtype=torch.float64) for node in sums}
    for node, matrix in readers.items():
        read, weight = input_of(node), matrix.read(edit.program).double().cpu()
        own, part = weight.T @ weight, sums[input_of(node)]
        variance = part.covariance.double().cpu() * (part.count * size / part.gram.trace().clamp_min(1e-30).cpu())
        weights[read] += own / (own * variance).sum().clamp_min(1e-30)
    start = principal_components(torch.stack([*grams.values()]).mean(0), torch.stack([*weights.values()]).sum(0))
    return nested_components(start, [(grams[node], weights[node]) for node in grams])
