"""Microbatches: a large batch is faster in pieces whose activations stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import sympy
import torch
from torch import fx

from lissom.backends.exported import leaves_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.types import Size
from lissom.compiler.verify.divergence import compare, tolerance_of
from lissom.measure.timing import ENOUGH, time_calls

Call = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]

_LARGEST = 64
"""The largest batch that microbatches are compared with."""
_GAIN = 0.95
"""A row in a microbatch must take less than this fraction of its time in a large batch, so that noise does not decide."""


@dataclass(frozen=True)
class Cutting:
    """The split of calls into microbatches.

    Attributes:
        batch: the indices of the inputs with a batch dimension.
        elements: of the first of these inputs in one microbatch; tokens where it holds token ids.
    """

    batch: tuple[int, ...]
    elements: int

    def __call__(self, call: Call, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of the call, computed in microbatches where the batch is at least two of them."""
        first = inputs[self.batch[0]]
        rows = max(1, self.elements // max(1, first[:1].numel()))
        if len(first) < 2 * rows:
            return call(inputs)
        count = -(-len(first) // rows)
        pieces = {index: torch.tensor_split(inputs[index], count) for index in self.batch}
        results = [
            call([pieces[index][part] if index in pieces else tensor for index, tensor in enumerate(inputs)])
            for part in range(count)
        ]
        return [torch.cat(parts) for parts in zip(*results, strict=True)]


def batch_inputs(program: Program) -> tuple[int, ...]:
    """The inputs whose first dimension is the batch, when rows seem to be independent; empty otherwise.

    It looks at shapes and not at operators, so the outputs of microbatches have to be compared with those of a whole batch.
    """
    leaves = [leaf for leaf in leaves_of(program) if isinstance(leaf, fx.Node)]
    shapes = [leaf.type.shape for leaf in program.signature.tensors]
    batch = next((shape[0] for shape in shapes if shape and isinstance(shape[0], sympy.Symbol)), None)
    if batch is None or not leaves:
        return ()
    results = [nodes.tensor_type(leaf).shape for leaf in leaves]
    if any(not shape or shape[0] != batch or _mentions(shape[1:], batch) for shape in results):
        return ()
    if any(_mentions(shape[1:], batch) for shape in shapes) or any(_loses(node, batch) for node in program.nodes()):
        return ()
    return tuple(index for index, shape in enumerate(shapes) if shape and shape[0] == batch)


def fastest_cutting(call: Call, program: Program, example: Sample, seconds: float) -> tuple[Cutting, str] | None:
    """The microbatch size that makes large batches faster, and the times in words; None where none does.

    Args:
        seconds: how long to time each size, in at least five calls.
    """
    batch = batch_inputs(program)
    if not batch:
        return None
    symbol = program.signature.tensors[batch[0]].type.shape[0]
    assert isinstance(symbol, sympy.Symbol)
    dimension = program.signature.dimensions[symbol]
    smallest = program.signature.sample_at(example, {symbol: max(dimension.minimum, 1)})
    if smallest is None:
        return None
    once = time_calls({"one": partial(call, smallest)}, seconds / 4, most=ENOUGH)["one"].median_ms
    # A large batch takes some fifth of a second, so that all sizes are timed in a second or two.
    largest = min(_LARGEST, dimension.maximum or _LARGEST, 1 << max(0, int(200 / max(once, 1e-3)).bit_length() - 1))
    counts = [largest >> step for step in range(5) if largest >> step >= max(1, dimension.minimum)]
    tried = {count: program.signature.sample_at(example, {symbol: count}) for count in counts}
    samples = {count: sample for count, sample in tried.items() if sample is not None}
    if len(samples) < 2 or largest not in samples:
        return None
    timings = time_calls({str(count): partial(call, sample) for count, sample in samples.items()}, seconds / 2, most=ENOUGH)
    a_row = {count: timings[str(count)].low_ms / count for count in samples}
    best = min(a_row, key=lambda count: a_row[count])
    if a_row[best] > _GAIN * a_row[largest] or 2 * best > largest:
        return None
    cutting = Cutting(batch, samples[best][batch[0]].numel())
    whole, pieces = call(samples[largest]), cutting(call, samples[largest])
    if compare([whole], [pieces]).relative_error > tolerance_of(program):
        return None
    told = f"{a_row[best]:.3g} ms a row in batches of {best} and {a_row[largest]:.3g} ms in batches of {largest}"
    return cutting, told


def _mentions(shape: Sequence[Size], symbol: sympy.Symbol) -> bool:
    return any(not isinstance(size, int) and symbol in size.free_symbols for size in shape)


def _loses(node: fx.Node, symbol: sympy.Symbol) -> bool:
    """True when an input has the dimension and the output does not, as in a sum over it."""
    if not nodes.is_tensor(node) or _mentions(nodes.tensor_type(node).shape, symbol):
        return False
    return any(nodes.is_tensor(used) and _mentions(nodes.tensor_type(used).shape, symbol) for used in node.all_input_nodes)
