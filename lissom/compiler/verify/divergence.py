"""The divergence of two programs' outputs, its tolerance, and the first node that differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.interpreter import REFUSALS, ObserverOfEach
from lissom.compiler.ir.operators import UNFILLED
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, smaller_samples
from lissom.errors import VerifyError

Item = TypeVar("Item")

TOLERANCE = {
    # Two float64 kernels that sum a few thousand terms in another order differ by some 1e-14.
    torch.float64: 1e-12,
    # The same in float32 (unit roundoff 6e-8): 1e-7 to 5e-6 measured over 12 to 96 layers.
    torch.float32: 2e-5,
    # One rounding to 11 bits is 5e-4; a residual stream has some twenty of them.
    torch.float16: 1e-2,
    # One rounding to 8 bits is 4e-3; likewise.
    torch.bfloat16: 8e-2,
}
LOCAL_TOLERANCE = 5e-3
"""The error allowed at a node when activations are quantized: one 8-bit value rounded the other way changes a sum of at least
sixteen values by less, relative to the largest sum.
"""
_COUNTED = 0.99
"""The quantile of magnitudes that is the size of a tensor: one channel in a hundred may be an outlier."""
_EXTREME, _GAP = 1e3, 1e3
"""Magnitudes from `_EXTREME` on, and `_GAP` times as large as the next smaller one, are mask values: -1e4, -1e30."""
_NOISE = 1e-6
"""The least size in comparisons, so that noise is not divided by noise."""
_SAMPLED = 1 << 16
"""The size of a larger tensor is estimated from that many of its values."""
_AT_ONCE = 1 << 20
"""The values that are taken to float64 at once."""
_EXACT = {torch.bool, torch.int64}
"""Masks and indices: they are equal in two correct programs, whatever floating type they are computed from."""


def tolerances(program: Program) -> list[float]:
    """The relative error allowed between two correct programs for each output, then for each buffer of the state."""
    allowed = program.fact(node_tolerances)
    writes = {str(nodes.operand(node).target): node for node in program.nodes() if nodes.is_state_write(node)}
    ends = [*program.leaves, *map(writes.get, program.state)]
    return [allowed[end] if isinstance(end, fx.Node) else TOLERANCE[torch.float32] for end in ends]


def tolerance_of(program: Program) -> float:
    """The largest of `tolerances`."""
    return max(tolerances(program), default=TOLERANCE[torch.float32])


def node_tolerances(program: Program) -> dict[fx.Node, float]:
    """The relative error allowed between two correct programs at each node: that of the lowest floating-point precision among
    the calls it depends on. Weights and inputs are the same in both.
    """
    coarsest: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        dtype = nodes.tensor_type(node).dtype if nodes.is_tensor(node) else None
        computed = node.op == "call_function" or (node.op == "get_attr" and str(node.target) in program.state)
        own = TOLERANCE.get(dtype, 0.0) if computed and dtype is not None else 0.0
        coarsest[node] = 0.0 if dtype in _EXACT else max((coarsest[used] for used in node.all_input_nodes), default=0.0)
        coarsest[node] = max(coarsest[node], own)
    return {node: tolerance or TOLERANCE[torch.float32] for node, tolerance in coarsest.items()}


@dataclass(frozen=True)
class Divergence:
    """The divergence of outputs from those of another program, over all samples.

    Attributes:
        relative_error: the function `relative_error` for the worst output.
        cosine: the smallest cosine similarity between the two values of one floating-point output, without mask values.
    """

    relative_error: float
    cosine: float


def run_original(
    program: Program, samples: Sequence[Sample], known: Sequence[list[object]] = ()
) -> tuple[list[Sample], list[list[object]], list[str]]:
    """The samples on which the program runs without NaN, its outputs on them, and a note on each of the others.

    All but the first are drawn from the first, and a drawn input may violate a model's assertion: an end token in every row.

    Args:
        known: the outputs on the first samples, which are kept.

    Raises:
        VerifyError: when the program does not run on the first sample.
    """
    kept, outputs, notes = [*samples[: len(known)]], [*known], list[str]()
    if len(groups(program, samples)) < len(samples):
        with suppress(*REFUSALS):
            together = [*known, *run_samples(program, samples[len(known) :])]
            if not any(_new_nan(sample_outputs, together[0]) for sample_outputs in together[1:]):
                return [*samples], together, []
    for index, sample in enumerate(samples[len(known) :], len(known)):
        try:
            sample_outputs, refusal = run_samples(program, [sample])[0], ""
        except REFUSALS as error:
            refusal = f"which the model refuses: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if index == 0:
                reason = refusal.partition(": ")[2]
                raise VerifyError(f"{program.name} as captured does not run on the example inputs: {reason}") from error
            sample_outputs = None
        if sample_outputs is not None and index and _new_nan(sample_outputs, outputs[0]):
            sample_outputs, refusal = None, "for which the model returns NaN"
        if sample_outputs is None:
            shapes = shapes_of(sample)
            sample, sample_outputs = _smaller(program, samples[0], sample, outputs[0])
            instead = "" if sample_outputs is None else f"; checked on {shapes_of(sample)} instead"
            notes.append(f"no check on inputs {shapes}, {refusal}{instead}")
        if sample_outputs is not None:
            kept.append(sample)
            outputs.append(sample_outputs)
    return kept, outputs, notes


def _smaller(program: Program, example: Sample, sample: Sample, usual: Sequence[object]) -> tuple[Sample, list[object] | None]:
    """A smaller form of a sample on which the program runs without NaN, with its outputs; None if it runs on none."""
    for smaller in smaller_samples(program.signature, example, sample):
        with suppress(*REFUSALS):
            outputs = run_samples(program, [smaller])[0]
            if not _new_nan(outputs, usual):
                return smaller, outputs
    return sample, None


def _new_nan(outputs: Sequence[object], usual: Sequence[object]) -> bool:
    return any(map(_has_nan, outputs)) and not any(map(_has_nan, usual))


def _has_nan(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any())


def shapes_of(sample: Sample) -> str:
    """`[2, 7], [2, 7]`."""
    return ", ".join(str(list(tensor.shape)) for tensor in sample)


def run_samples(program: Program, samples: Sequence[Sample], observe: ObserverOfEach | None = None) -> list[list[object]]:
    """The program's flat outputs on each sample, then its state after the call, without gradients; restores the state.

    A large state follows the first sample's outputs alone: what a call writes, the call reads as well.

    Args:
        observe: as for `Program.run_each`.
    """
    outputs, small = list[list[object]](), _state_bytes(program) <= _LARGE_STATE
    with torch.no_grad():
        for group in groups(program, samples):
            first = len(outputs)
            seen = None if observe is None else partial(_with_index, observe, first)
            if len(group) > 1:
                ran = program.run_each(group, seen)
            else:
                with kept_state(program):
                    ran = [[*program.run(group[0], None if seen is None else partial(seen, 0)), *program.state_values()]]
            outputs += [row if small or first + index == 0 else row[: len(program.leaves)] for index, row in enumerate(ran)]
            del ran
    return outputs


def _with_index(observe: ObserverOfEach, first: int, index: int, node: fx.Node, value: object) -> object:
    return observe(first + index, node, value)


_MUCH, _HELD_STATE, _LARGE_STATE = 1 << 28, 1 << 29, 1 << 26
"""The bytes of weights from which samples run together, of their states at most, and of a state that all outputs have."""


def groups(program: Program, samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    """The samples that run together, call by call, as reading many bytes of weights takes longer than values take memory.

    They are fewer the larger the program's state is, of which each has its own.
    """
    much = program.parameter_bytes >= _MUCH and not program.is_simulation
    size = max(1, _HELD_STATE // max(1, _state_bytes(program))) if much else 1
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _state_bytes(program: Program) -> int:
    return sum(tensor.nbytes for tensor in program.state_tensors())


def runs(program: Program, sample: Sample) -> bool:
    """True if the program takes the sample: a model may refuse sizes that its signature allows."""
    try:
        run_samples(program, [sample])
    except REFUSALS:
        return False
    return True


def answers(program: Program, outputs: Sequence[list[object]]) -> list[list[object]]:
    """The outputs of `run_samples` without the state, which a lossy pass may store in another form."""
    return [sample_outputs[: len(program.leaves)] for sample_outputs in outputs]


def with_kept_form(
    before: Program, after: Program, outputs: Sequence[list[Item]], *, of: Program | None = None
) -> list[list[Item]]:
    """The outputs of `run_samples` with only the state that has the same name and form in both programs.

    A rewrite may store less state, such as one head of a KV cache for several, or store it in another basis under another name;
    its effect is visible in the other outputs.

    Args:
        of: the program of the outputs; `before` by default.
    """
    program = before if of is None else of
    count, names = len(before.leaves), [name for name in before.state if name in after.state]
    pairs = [(before.weight(name), after.weight(name)) for name in names]
    kept = [name for name, (old, new) in zip(names, pairs, strict=True) if (old.shape, old.dtype) == (new.shape, new.dtype)]
    places = [count + program.state.index(name) for name in kept]
    return [
        [*sample_outputs[:count], *(sample_outputs[place] for place in places if place < len(sample_outputs))]
        for sample_outputs in outputs
    ]


def compare(wanted: Sequence[Sequence[object]], actual: Sequence[Sequence[object]], *, masked: bool = False) -> Divergence:
    """The divergence of the outputs `actual` from `wanted`, sample by sample, output by output.

    Args:
        masked: leave out values that are -inf in `actual`: logits that were masked on purpose.
    """
    if masked:
        wanted = [list(map(_masked_like, left, right)) for left, right in zip(wanted, actual, strict=True)]
    cosines = [1.0]
    for left, right in zip(wanted, actual, strict=True):
        for a, b in zip(left, right, strict=True):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point():
                cosines.append(_cosine(a, b))
    return Divergence(max(output_errors(wanted, actual), default=0.0), min(cosines))


def _masked_like(wanted: object, actual: object) -> object:
    """A tensor with -inf where the other has it; anything else as it is."""
    if not isinstance(wanted, torch.Tensor) or not isinstance(actual, torch.Tensor) or wanted.shape != actual.shape:
        return wanted
    return wanted.masked_fill(actual == -math.inf, -math.inf) if wanted.is_floating_point() else wanted


def output_errors(wanted: Sequence[Sequence[object]], actual: Sequence[Sequence[object]]) -> list[float]:
    """The relative error of each output, the maximum over all samples."""
    errors = [list(map(relative_error, left, right)) for left, right in zip(wanted, actual, strict=True)]
    return [max(column) for column in zip_longest(*errors, fillvalue=0.0)]  # a large state follows the first alone


def relative_error(wanted: object, actual: object) -> float:
    """max |a - b| / max(|a|, size of the tensor); infinite when shapes, dtypes or the places of NaN and infinity differ.

    The size is the 99th percentile of the magnitudes that are neither zero nor mask values. So neither an outlier channel nor
    one -1e30 hides errors in other values, and the outliers must be right relative to their own magnitude. Integers and
    booleans must be equal.
    """
    if not isinstance(wanted, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return 0.0 if type(wanted) is type(actual) and wanted == actual else math.inf
    if wanted.shape != actual.shape or wanted.dtype != actual.dtype:
        return math.inf
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(wanted, actual) else math.inf
    a, b = wanted.detach(), actual.detach()
    if torch.equal(a, b):
        return 0.0
    precise = torch.complex128 if a.is_complex() else torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(precise), b.to(precise)
    if not (_is_finite(a) and _is_finite(b)):
        odd = ~torch.isfinite(a)
        if not torch.equal(odd, ~torch.isfinite(b)) or not torch.equal(a[odd].nan_to_num(), b[odd].nan_to_num()):
            return math.inf
        a, b = a.masked_fill(odd, 0), b.masked_fill(odd, 0)
    size, _ = _size(a)
    return float((a - b).abs().div_(a.abs().clamp_min_(size)).max())


def _is_finite(values: torch.Tensor) -> bool:
    """True if a tensor with elements has no NaN or infinity, which its extremes show."""
    return not values.is_complex() and all(map(math.isfinite, map(float, values.aminmax())))


def _size(values: torch.Tensor) -> tuple[float, float]:
    """The size of a tensor of finite values, and the largest magnitude that is no mask value."""
    magnitudes = _sampled(values).abs()
    magnitudes = magnitudes[magnitudes > 0]
    if magnitudes.numel() == 0:
        return _NOISE, math.inf
    largest = float(magnitudes.max())
    if largest < _EXTREME:  # no mask values, and no need to sort
        size = float(magnitudes.kthvalue(math.ceil(_COUNTED * magnitudes.numel())).values)
        return max(size, _NOISE), max(largest * _GAP, _EXTREME)
    magnitudes = magnitudes.sort().values
    jumps = ((magnitudes[1:] > _GAP * magnitudes[:-1]) & (magnitudes[1:] >= _EXTREME)).nonzero()
    if len(jumps):
        magnitudes = magnitudes[: int(jumps[0]) + 1]
    size = float(magnitudes[math.ceil(_COUNTED * magnitudes.numel()) - 1])
    return max(size, _NOISE), max(float(magnitudes[-1]) * _GAP, _EXTREME)


def _sampled(values: torch.Tensor) -> torch.Tensor:
    """The values in one dimension, or `_SAMPLED` of them where there are more."""
    values, count = values.flatten(), values.numel()
    return values[_sampled_places(count).to(values.device)] if count > _SAMPLED else values


@lru_cache(maxsize=32)
def _sampled_places(count: int) -> torch.Tensor:
    return torch.randint(count, (_SAMPLED,), generator=torch.Generator().manual_seed(0))


def _cosine(wanted: torch.Tensor, actual: torch.Tensor) -> float:
    if wanted.dtype == actual.dtype and torch.equal(wanted, actual):
        return 1.0
    a, b = wanted.detach().flatten(), actual.detach().flatten()
    if a.numel() != b.numel():
        return -1.0
    left, right = _sampled(a).double(), _sampled(b).double()
    largest = _size(left.where(left.isfinite() & right.isfinite(), 0.0))[1]
    products = torch.zeros(3, dtype=torch.float64, device=a.device)
    for part, other in zip(a.split(_AT_ONCE), b.split(_AT_ONCE), strict=True):
        left, right = part.double(), other.double()
        counted = left.isfinite() & right.isfinite() & (left.abs() <= largest)
        left, right = left.where(counted, 0.0), right.where(counted, 0.0)
        products += torch.stack([left @ left, right @ right, left @ right])
    one, two, both = products.tolist()
    return both / math.sqrt(one * two) if one > 0 and two > 0 else 1.0


def first_difference(
    before: Program, after: Program, sample: Sample, tolerance: float | None = None
) -> tuple[fx.Node, float] | None:
    """The first node of `after` whose value differs from that of the corresponding node in `before`.

    Nodes correspond by name, or by the name a pass recorded when it replaced one by the other.

    Args:
        tolerance: the allowed relative error; by default that of `node_tolerances`.
    """
    values: dict[str, object] = {}
    with torch.no_grad(), kept_state(before):
        before.run(sample, lambda node, value: values.update({node.name: lasting(node, value)}))
    differences: list[tuple[fx.Node, float]] = []
    allowed = {node.name: limit for node, limit in before.fact(node_tolerances).items()}

    def observe(node: fx.Node, value: object) -> None:
        name = node.name if node.name in values else nodes.origin(node).replaces
        if differences or name not in values or both_unfilled(before, name, node):
            return
        error = worst_error(values[name], value)
        if error > (allowed[name] if tolerance is None else tolerance):
            differences.append((node, error))

    with torch.no_grad(), kept_state(after):
        after.run(sample, observe)
    return differences[0] if differences else None


def both_unfilled(before: Program, name: str, node: fx.Node) -> bool:
    """True when a node and its counterpart `name` in `before` allocate memory without filling it: values there mean nothing."""
    return node.target in UNFILLED and any(other.name == name for other in before.nodes(*UNFILLED))


def lasting(node: fx.Node, value: object) -> object:
    """A value that later writes do not change: a write of state returns the state itself, so it is cloned."""
    return value.clone() if nodes.is_state_write(node) and isinstance(value, torch.Tensor) else value


def worst_error(wanted: object, actual: object) -> float:
    """The relative error of two values, the maximum over their items when they are tuples."""
    if isinstance(wanted, (tuple, list)) and isinstance(actual, (tuple, list)):
        return max(map(worst_error, wanted, actual), default=0.0)
    return relative_error(wanted, actual)
