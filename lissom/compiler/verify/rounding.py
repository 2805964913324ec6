"""The allowed error between two correct programs when later operators amplify rounding differences.

In a quantized program a value half way between two steps may round either way, depending on the last bit of a sum taken in
another order. All later values change with it, and the outputs of two correct programs differ by more than sums do. In floating
point, a deep model with few large values in its residual stream does the same gradually. So not only outputs are compared:

- `local_errors` feeds every node of one program the values that its inputs have in the other. Then a single rounding counts.
- `rounding_loss` is the error of the outputs from all quantization. Two correct programs differ by at most some of it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import REFUSALS, call
from lissom.compiler.ir.operators import FAKE_QUANTIZES, INT8_LINEARS, INTEGER_PRODUCTS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.paging import spill
from lissom.compiler.verify.divergence import (
    LOCAL_TOLERANCE,
    TOLERANCE,
    both_unfilled,
    compare,
    groups,
    lasting,
    node_tolerances,
    output_errors,
    relative_error,
    run_samples,
    worst_error,
)
from lissom.compiler.verify.representatives import Representatives, representatives

aten = torch.ops.aten

LOCAL_FLOAT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}
"""One sum of a few thousand terms in another order, with fused operators: 1e-7 to 2e-6 measured in float32."""
ROUNDINGS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""The relative error of one rounding to a reduced-precision dtype."""
_FUSED = 4
"""The number of roundings at a node in two programs together: one in a kernel, and at most one in each of the three operators
it replaces, such as a product, its activation and the product with a gate.
"""
SHARE = 2.0
"""Two programs with the same quantization differ by less than this multiple of `rounding_loss`.

A change of 1e-7 in one table of MiniLM changes its outputs by up to 1.0 times the loss, since one value rounded the other way
changes all later ones. Two programs with independent rounding would differ by 1.4 times, and more in the worst of few samples.
"""
_AS_FAR = 4.0
"""The largest ratio of two programs' errors from the exact result: on few samples one of them may be lucky."""
_LOCALLY_AS_FAR = 2.0
"""The largest such ratio at one node: its error is the largest of thousands of values, so luck counts for less."""
_DECIDED = (torch.float32, *ROUNDINGS)
"""The dtypes of nodes whose value in float64 decides where large terms cancel."""
_WIDER = {
    torch.float32: TOLERANCE[torch.float32],
    # A pass that rescales weights rounds each of them once more to float32, by 6e-8; 4e-8 measured at the outputs.
    torch.float64: 1e-6,
}
"""The error of two correct programs' outputs when both run in a wider dtype."""
_ERASED = 2e-3
"""The error of two correct programs' outputs in float32 if -1e4 is added to scores: that rounds them to thousandths."""
_ROUNDING = {*FAKE_QUANTIZES, *INT8_LINEARS, *INTEGER_PRODUCTS}


def rounds_values(program: Program) -> bool:
    """True when the program quantizes activations, not only weights."""
    return any(_rounds(node, _ROUNDING) or _stores_whole(node) for node in program.nodes())


def local_tolerances(program: Program) -> dict[str, float]:
    """By node name, the error allowed at a node when its inputs have the values of the program before.

    It is that of one sum in the lowest-precision dtype the node depends on, or of one value rounded the other way when the
    program quantizes activations.
    """
    rounds, sums = rounds_values(program), dict[float, float]()
    for dtype, tolerance in TOLERANCE.items():
        plain = LOCAL_FLOAT_TOLERANCE.get(dtype, LOCAL_FLOAT_TOLERANCE[torch.float32])
        sums[tolerance] = _FUSED * ROUNDINGS.get(dtype, 0.0) + (LOCAL_TOLERANCE if rounds else plain)
    return {node.name: sums[tolerance] for node, tolerance in program.fact(node_tolerances).items()}


def differs_locally(before: Program, after: Program, samples: Sequence[Sample], *, strict: bool = False) -> bool:
    """True when a node of `after` differs by more than its own rounding, given the values of its inputs in `before`.

    Nodes correspond by name, or by the name a pass recorded when it replaced one by the other; other nodes keep the values of
    `after`. A sum in which large terms cancel rounds by more than its tolerance, also in `before`; then its value in float64
    decides: if the comparison is strict, `after` must be as near to that as the tolerance.
    """
    allowed = before.fact(local_tolerances)

    def differs(chosen: Representatives | None) -> bool:
        errors = (local_errors(before, after, group, allowed, chosen, strict).items() for group in groups(before, samples))
        return any(error > allowed[name] for of_group in errors for name, error in of_group)

    chosen = representatives(before, after)
    # A layer that is cut out may read values that only `after` has.
    return differs(chosen) and (chosen is None or differs(None))


def _stores_whole(node: fx.Node) -> bool:
    """True for a cast of floating-point values to bytes, as for a quantized KV cache."""
    if not nodes.is_call(node, aten.to.dtype):
        return False
    floating = nodes.tensor_type(nodes.operand(node)).dtype.is_floating_point
    return floating and nodes.tensor_type(node).dtype in (torch.int8, torch.uint8)


def _rounds(node: fx.Node, operators: Collection[object]) -> bool:
    return node.target in operators and nodes.operand(node).op != "get_attr"


def right_in_wider(
    before: Program,
    after: Program,
    samples: Sequence[Sample],
    wanted: Sequence[Sequence[object]],
    actual: Sequence[Sequence[object]],
) -> bool:
    """True when the outputs `actual` are right although they differ from those `wanted` of the program before, judged by that
    program's outputs in a wider dtype.

    The program after must give the same outputs in the wider dtype; if float32 is not wide enough, in float64. If its kernels
    do not support the dtype, it must be `as_close`.
    """
    exact = None if after.is_simulation else exact_outputs(before, samples)
    if exact is None:
        return False
    error = _error_in_wider(after, exact)
    if error is None or error <= _WIDER[exact.dtype]:
        return error is not None or exact.as_close(wanted, actual)
    if exact.dtype is torch.float64:
        return False
    widest = exact_outputs(before, samples, torch.float64)
    in_widest = None if widest is None else _error_in_wider(after, widest)
    if in_widest is not None:
        return in_widest <= _WIDER[torch.float64]
    return error <= _ERASED and exact.as_close(wanted, actual)


def _error_in_wider(program: Program, exact: ExactOutputs) -> float | None:
    """The relative error of the program's outputs in the wider dtype; None if its kernels do not support it."""
    try:
        outputs = run_samples(_widened_program(program, exact.dtype), exact.samples)
    except REFUSALS:
        return None
    return compare(exact.outputs, outputs).relative_error


@dataclass(frozen=True)
class ExactOutputs:
    """The outputs of a program in a wider dtype: float64, or float32 instead of 16 bits.

    Attributes:
        samples: its inputs in that dtype.
    """

    dtype: torch.dtype
    samples: Sequence[Sample]
    outputs: Sequence[Sequence[object]]

    def as_close(self, wanted: Sequence[Sequence[object]], actual: Sequence[Sequence[object]]) -> bool:
        """True when the errors of the outputs `actual` are at most `_AS_FAR` times those of the program's outputs `wanted`."""
        own, errors = (
            output_errors(self.outputs, [[_widened(value, self.dtype) for value in outputs] for outputs in given])
            for given in (wanted, actual)
        )
        return all(error <= _AS_FAR * rounded for error, rounded in zip(errors, own, strict=True))


def exact_outputs(program: Program, samples: Sequence[Sample], wide: torch.dtype | None = None) -> ExactOutputs | None:
    """The outputs of a program in a wider dtype; None for a program with state or ranks, or that does not run in it.

    For a query that sees only padding, -1e4 is added to every score. In bfloat16 this erases the scores, in float32 all but
    their thousandths, and softmax amplifies the difference.

    Args:
        wide: by default float32 for a program with 16-bit values, since more kernels support it, and float64 for others.
    """
    if program.is_simulation or program.state:
        return None
    if wide is None:
        tensors = (*program.weights().values(), *map(nodes.tensor_type, filter(nodes.is_tensor, program.nodes())))
        wide = torch.float32 if any(tensor.dtype in ROUNDINGS for tensor in tensors) else torch.float64
    inputs = [[_widened(tensor, wide) for tensor in sample] for sample in samples]
    try:
        return ExactOutputs(wide, inputs, run_samples(_widened_program(program, wide), inputs))
    except REFUSALS:
        return None


def _widened_program(program: Program, wide: torch.dtype) -> Program:
    widened = program.copy()
    for name, tensor in program.weights().items():
        widened.set_weight(name, _widened(tensor.detach(), wide))
    for node in widened.nodes():
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), partial(_widened, wide=wide))
    return widened


def _widened(value: Any, wide: torch.dtype) -> Any:
    """A tensor or dtype of a narrower floating-point type in the wide one; anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return value.to(wide) if _is_narrower(value.dtype, wide) else value
    return wide if isinstance(value, torch.dtype) and _is_narrower(value, wide) else value


def _is_narrower(dtype: torch.dtype, wide: torch.dtype) -> bool:
    return dtype in ROUNDINGS or (dtype is torch.float32 and wide is torch.float64)


def local_errors(
    before: Program,
    after: Program,
    samples: Sequence[Sample],
    allowed: Mapping[str, float] | None = None,
    chosen: Representatives | None = None,
    strict: bool = False,
) -> dict[str, float]:
    """By the names of nodes of `before`, the relative error of the corresponding nodes of `after`, given the values of
    `before`: the largest on all samples. Includes the errors of the outputs.

    Args:
        allowed: by name; a larger error counts as this one if the value of `after` is as near to that in float64.
        chosen: the nodes that are compared; all by default.
        strict: as near as this error, and not as the value of `before`.
    """
    known: list[dict[str, object]] = [{} for _ in samples]
    # Others, such as quantized weights that are packed, have no counterpart.
    needed = {name for node in after.nodes() for name in (node.name, nodes.origin(node).replaces)}
    if chosen is not None:
        needed &= {*chosen.compared, *chosen.read}

    def keep(index: int, node: fx.Node, value: object) -> None:
        if node.name in needed:
            known[index][node.name] = value = lasting(node, value)
            if isinstance(value, torch.Tensor):
                spill(value)

    wanted = run_samples(before, samples, keep)
    errors, given_too = [dict[str, float]() for _ in samples], [set[str]() for _ in samples]
    by_name = {node.name: node for node in before.nodes()}
    given = [dict(zip(before.placeholders, sample, strict=True)) for sample in samples]

    def force(index: int, node: fx.Node, value: object) -> object:
        """Record the error of a node's value, and return that of the corresponding node; None when there is none."""
        own, found = known[index], errors[index]
        name = node.name if node.name in own else nodes.origin(node).replaces
        if name not in own or not _alike(own[name], value):
            return None
        if chosen is not None and name in chosen.read:
            given_too[index].add(name)
            return own[name]
        if both_unfilled(before, name, node):
            return own[name]
        error, limit = worst_error(own[name], value), (allowed or {}).get(name, math.inf)
        corresponding = found.keys() | given_too[index]
        near = limit if strict else None
        if error > limit and _is_as_exact(before, by_name[name], value, own, corresponding, given[index], near):
            error = limit
        found[name] = max(found.get(name, 0.0), error)
        return own[name]

    results = run_samples(after, samples, force)
    for found, old, new in zip(errors, wanted, results, strict=True):
        for leaf, left, right in zip(before.leaves, old, new, strict=False):  # the state follows
            name = leaf.name if isinstance(leaf, fx.Node) else before.output.name
            found[name] = max(found.get(name, 0.0), relative_error(left, right))
        for name, left, right in _written(before, after, old, new):
            if chosen is None or name in chosen.compared:
                found[name] = max(found.get(name, 0.0), relative_error(left, right))
    worst = dict[str, float]()
    for name, error in (pair for found in errors for pair in found.items()):
        worst[name] = max(worst.get(name, 0.0), error)
    return worst


def _written(
    before: Program, after: Program, wanted: Sequence[object], actual: Sequence[object]
) -> list[tuple[str, object, object]]:
    """The buffers of the state that both programs have in one form, after a call, by the name of the call that writes each."""
    writes = {str(nodes.operand(node).target): node.name for node in before.nodes() if nodes.is_state_write(node)}
    old = dict(zip(before.state, wanted[len(before.leaves) :], strict=False))
    new = dict(zip(after.state, actual[len(after.leaves) :], strict=False))
    both = [name for name in old if name in writes and name in new and _alike(old[name], new[name])]
    return [(writes[name], old[name], new[name]) for name in both]


def _is_as_exact(
    before: Program,
    node: fx.Node,
    actual: object,
    known: Mapping[str, object],
    corresponding: Collection[str],
    given: Mapping[fx.Node, torch.Tensor],
    near: float | None,
) -> bool:
    """True when a value of 32 or 16 bits is as near to that in float64 as `near`, by default as that of `before` times
    `_LOCALLY_AS_FAR`.

    In bfloat16 the simulation rounds quantized activations and weights once more before they are multiplied, and a kernel does
    not.

    Args:
        known: the values of `before`.
        corresponding: the nodes that have these values in `after` too; those between them and the node are computed in float64.
        given: the inputs.
        near: a relative error.
    """

    def exact(used: fx.Node) -> object:
        if used is not node and used.name in corresponding:
            return _widened(known[used.name], torch.float64)
        if used.op != "call_function":
            value = given[used] if used in given else before.weight(str(used.target))
            return _widened(value, torch.float64)
        if used not in computed:
            computed[used] = call(used, exact, widened)
        return computed[used]

    computed: dict[fx.Node, object] = {}
    widened = partial(_widened, wide=torch.float64)
    own = known[node.name]
    if not (isinstance(own, torch.Tensor) and isinstance(actual, torch.Tensor) and own.dtype in _DECIDED):
        return False
    try:
        wanted = exact(node)
    except REFUSALS:  # an operator without float64
        return False
    near = _LOCALLY_AS_FAR * relative_error(wanted, own.double()) if near is None else near
    return relative_error(wanted, actual.double()) <= near


def _alike(wanted: object, actual: object) -> bool:
    """True for values of the same form; when a pass changed the form, only later nodes are compared."""
    if isinstance(wanted, torch.Tensor) and isinstance(actual, torch.Tensor):
        return wanted.shape == actual.shape and wanted.dtype == actual.dtype
    if isinstance(wanted, (tuple, list)) and isinstance(actual, (tuple, list)):
        return len(wanted) == len(actual) and all(map(_alike, wanted, actual))
    return type(wanted) is type(actual)
