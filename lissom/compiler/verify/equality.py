"""Checks that an exact pass, or a backend, keeps a program's outputs, its node values when these are quantized, and its memory
sharing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import printer
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify import rounding
from lissom.compiler.verify.divergence import (
    TOLERANCE,
    answers,
    first_difference,
    output_errors,
    relative_error,
    run_original,
    shapes_of,
    tolerances,
    with_kept_form,
)
from lissom.compiler.verify.rounding_loss import rounding_loss
from lissom.errors import VerifyError

_ROUNDED_TWICE = {TOLERANCE[dtype]: 2 * error for dtype, error in rounding.ROUNDINGS.items()}
"""From the tolerance of a reduced-precision output to the error of one value that one program rounds up and the other down.

Above it, nodes are compared one by one: accumulated rounding errors of a model can be as large as those of a scale that is
wrong by 5 %.
"""

_EARLIER = "an output of the call before"


def require_equal(
    before: Program,
    after: Program,
    samples: Sequence[Sample],
    wanted: Sequence[list[object]],
    actual: Sequence[list[object]],
    bitwise: bool = False,
    strict: bool = False,
) -> float:
    """The largest relative error of the outputs `actual` after an exact pass, against the outputs `wanted` before it.

    Args:
        bitwise: require equal bits.
        strict: require of each node what rounding explains by itself, without regard to how exact the program before is.

    Raises:
        VerifyError: naming the first node whose error is above its tolerance, the outputs that newly share memory, or state
            that is no longer written.
    """
    _check_writes(before, after)
    (limits,) = with_kept_form(before, after, [[0.0 if bitwise else _ROUNDED_TWICE.get(x, x) for x in tolerances(before)]])
    kept = with_kept_form(before, after, wanted), with_kept_form(before, after, actual, of=after)
    pairs = zip(*kept, strict=True)
    errors = [list(map(relative_error, old, new)) for old, new in pairs]
    excess = [[(error, limit) for error, limit in zip(row, limits, strict=False) if error > limit] for row in errors]
    if far := [index for index, row in enumerate(excess) if row]:
        given, old, new = [samples[i] for i in far], [wanted[i] for i in far], [actual[i] for i in far]
        if strict:
            if not _finite_alike(old, new) or rounding.differs_locally(before, after, given, strict=True):
                raise VerifyError("outputs differ")
        elif bitwise or not _rounds_alike(before, after, given, old, new):
            worst = max((pair for index in far for pair in excess[index]), key=lambda pair: pair[0] / (pair[1] or 1.0))
            _refuse(before, after, given, *worst)
    for sample, old, new in zip(samples, wanted, actual, strict=True):
        shared = _shared_memory(after, sample, new) - _shared_memory(before, sample, old)
        if shared:
            index, alias = min(shared)
            raise VerifyError(
                f"output {index} shares memory with {alias}, which it did not before; whoever writes to the one changes the "
                f"other: clone it"
            )
    return max((error for row in errors for error in row), default=0.0)


def _check_writes(before: Program, after: Program) -> None:
    """Refuse a program that stores state under new names, whose values are not compared, and writes less of it."""
    if set(after.state) <= set(before.state):
        return
    wanted, actual = (
        len({nodes.operand(node) for node in program.nodes() if nodes.is_state_write(node)}) for program in (before, after)
    )
    if actual < wanted:
        raise VerifyError(f"it writes {actual} of the {wanted} states that the program before it writes")


def _rounds_alike(
    before: Program, after: Program, samples: Sequence[Sample], wanted: Sequence[list[object]], actual: Sequence[list[object]]
) -> bool:
    """True when two programs with different outputs are both right: later operators amplified a rounding difference."""
    # Rounding makes no NaN, which comparing node by node may miss: ranks may have it in padding, float16 where it overflows.
    if not _finite_alike(wanted, actual):
        return False
    return not rounding.differs_locally(before, after, samples) or rounding.right_in_wider(
        before, after, samples, wanted, actual
    )


def _finite_alike(wanted: Sequence[list[object]], actual: Sequence[list[object]]) -> bool:
    """True when floating-point outputs are finite at the same places."""
    pairs = [pair for outputs in zip(wanted, actual, strict=True) for pair in zip(*outputs, strict=False)]
    return all(
        torch.equal(left.isfinite(), right.isfinite())
        for left, right in pairs
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and left.is_floating_point()
    )


def _refuse(before: Program, after: Program, samples: Sequence[Sample], error: float, allowed: float) -> NoReturn:
    message = f"its outputs differ from the program before by {error:.2g} relative, allowed {allowed:.2g}"
    for sample in samples:
        for tolerance in (None, allowed) if allowed else (0.0,):
            difference = first_difference(before, after, sample, tolerance)
            if difference is not None:
                node, worst = difference
                raise VerifyError(
                    f"{message}; the first node that differs is {printer.place(after, node)}, by {worst:.2g}\n"
                    f"{printer.excerpt(after, node)}"
                )
    raise VerifyError(f"{message}; no node that both programs have differs, so the outputs themselves were changed")


def require_built(
    name: str, call: Callable[[Sample], list[object]], program: Program, samples: Sequence[Sample], allowed: float = 0.0
) -> float:
    """The largest relative error of what was built from a program, called twice on each sample on which the program runs.

    Args:
        name: what was built, in words.
        call: gives its outputs, then its state after the call.
        allowed: the relative error it may have, where that is more than two correct programs differ by.

    Raises:
        VerifyError: when it does not run, gives other outputs, or returns memory that it uses again.
    """
    samples, wanted, _ = run_original(program, samples)
    rounded = rounding.SHARE * rounding_loss(program, samples, wanted) if rounding.rounds_values(program) else 0.0
    limits = [max(limit, allowed, rounded) for limit in tolerances(program)]
    worst = 0.0
    for sample, outputs in zip(samples, wanted, strict=True):
        subject, inputs = f"{name} from {program.name}", f"on inputs {shapes_of(sample)}"
        try:
            first, again = (call(sample) for _ in range(2))
        # The errors of other compilers and runtimes have no common class.
        except Exception as error:
            message = f"{subject} does not run {inputs}: {type(error).__name__}: {error}"
            raise VerifyError(f"{message}; choose another backend") from error
        exact = None
        for actual in (first, again):
            errors = output_errors([outputs], [actual])
            worst = max(worst, *errors, 0.0)
            over = [(error, limit) for error, limit in zip(errors, limits, strict=False) if error > limit]
            exact = exact or (rounding.exact_outputs(program, [sample]) if over else None)
            if over and (exact is None or not exact.as_close([outputs], [actual])):
                error, limit = over[0]
                raise VerifyError(
                    f"{subject} differs from the program by {error:.2g} relative {inputs}, allowed {limit:.2g}; "
                    f"choose another backend"
                )
        usual = _shared_memory(program, sample, outputs)
        same = {(index, _EARLIER) for index, _ in usual}  # an input or a weight, which every call shares
        for index, other in sorted(_shared_memory(program, sample, again, first) - usual - same)[:1]:
            raise VerifyError(f"{subject} gives an output {index} that shares memory with {other}; choose another backend")
    return worst


def _shared_memory(
    program: Program, sample: Sample, outputs: Sequence[object], earlier: Sequence[object] = ()
) -> set[tuple[int, str]]:
    """The outputs, by index, that share memory with an input, a weight, or an output of this call or `earlier`.

    Empty for a simulation, whose collectives lay out their results differently.
    """
    if program.is_simulation:
        return set()
    count = len(program.leaves)
    others = [(f"input '{leaf.path}'", held) for leaf, held in zip(program.signature.tensors, sample, strict=True)]
    others += [(_EARLIER, held) for held in earlier[:count] if isinstance(held, torch.Tensor)]
    weights = {weight.untyped_storage().data_ptr() for weight in program.weights().values()}
    shared = set[tuple[int, str]]()
    for index, tensor in enumerate(outputs[:count]):
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            shared |= {(index, name) for name, held in others if _overlap(tensor, held)}
            if tensor.untyped_storage().data_ptr() in weights:
                shared.add((index, "a weight"))
            others.append((f"output {index}", tensor))
    return shared


def _overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """True when two tensors share a memory location."""
    if not left.numel() or not right.numel() or left.untyped_storage().data_ptr() != right.untyped_storage().data_ptr():
        return False
    if left.dtype != right.dtype:
        return True
    # A value and its view from one chain are two storages at one address, each as long as its own tensor needs.
    size = max(tensor.untyped_storage().nbytes() for tensor in (left, right)) // left.element_size()
    places = torch.zeros(size, dtype=torch.bool)
    places.as_strided(left.shape, left.stride(), left.storage_offset()).fill_(True)
    return bool(places.as_strided(right.shape, right.stride(), right.storage_offset()).any())


def changed_strides(
    before: Program, wanted: Sequence[list[object]], after: Program, actual: Sequence[list[object]]
) -> list[str]:
    """Notes on the outputs, not the state, whose strides on the first sample changed."""
    notes = list[str]()
    pairs = zip(answers(before, wanted)[0], answers(after, actual)[0], strict=False)
    for index, (left, right) in enumerate(pairs):
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and _strides(left) != _strides(right):
            notes.append(f"output {index} has strides {tuple(right.stride())}, and had {tuple(left.stride())}")
    return notes


def _strides(tensor: torch.Tensor) -> list[int]:
    """The strides of dimensions with more than one element."""
    return [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1] if tensor.numel() else []
