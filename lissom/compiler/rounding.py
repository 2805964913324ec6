"""How far two correct programs may differ where what is behind a node makes more of its rounding.

In a quantized program a value half way between two steps may go either way, by the last bit of a sum taken in another order;
everything behind it follows, and at the end two correct programs differ by more than sums do. In floating point, a deep model
with few large values in its residual stream does the same by degrees. So they are not compared at the end alone:

- `local_error` gives every node of the one program the values its inputs have in the other. Then a single rounding counts.
- `rounding_loss` is what all the rounding changes at the end. Two correct programs differ by no more than some of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.execute import call, run_ranks
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample
from lissom.compiler.verify import compare, kept_state, lasting, run_samples, worst_error

aten = torch.ops.aten

LOCAL_TOLERANCE = 5e-3
"""One value of eight bits rounded the other way moves a sum over sixteen or more by less, relative to the largest sum."""
LOCAL_FLOAT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6}
"""One sum of a few thousand terms in another order, with what is fused to it: 1e-7 to 2e-6 seen in float32."""
_ROUNDINGS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""What one rounding to a short dtype costs."""
_FUSED = 4
"""How often two programs round where they differ: a kernel once, and each of the three operators it stands for at most, as a
product, its activation and the product with a gate.
"""
SHARE = 2.0
"""Two programs rounded alike differ by less than this many times what rounding changes.

A change of 1e-7 in one table of MiniLM moves its outputs by up to 1.0 times that, since a value rounded the other way moves all
behind it; two that round independently would differ by 1.4 times, and more at the worst of few samples.
"""
_FAKE = {"lissom.fake_quantize.default", "lissom.fake_quantize_dynamic.default"}
_PRODUCTS = {aten._int_mm.default, aten._scaled_mm.default}
"""Products whose first factor is rounded by operators before it, as `lower-quantized-products` writes them."""
_ROUNDING = {
    *(*_FAKE, "lissom.quantized_linear.default", "lissom.quantized_linear_norm.default"),
    *map(str, _PRODUCTS),
}


def rounds_values(program: Program) -> bool:
    """True when values are rounded while the program runs, not its weights alone."""
    return any(_rounds(node, _ROUNDING) or _stores_whole(node) for node in program.nodes())


def local_tolerance(program: Program) -> float:
    """The `local_error` a correct program may show, in the dtypes computed in: of one sum, or of one value rounded the other
    way where values are rounded.
    """
    dtypes = {nodes.tensor_type(node).dtype for node in program.nodes() if nodes.is_tensor(node)}
    sums = max((LOCAL_FLOAT_TOLERANCE[dtype] for dtype in dtypes if dtype in LOCAL_FLOAT_TOLERANCE), default=0.0)
    short = _FUSED * max((_ROUNDINGS.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    return short + (LOCAL_TOLERANCE if rounds_values(program) else sums)


def local_error(before: Program, after: Program, samples: Sequence[Sample]) -> float:
    """The largest relative error of a node of `after`, given the values that its inputs have in `before`.

    Nodes correspond by name, or by the name a pass recorded when it replaced one by the other; between them, values of `after`.
    """
    return max((_forced_error(before, after, sample) for sample in samples), default=0.0)


def rounding_loss(program: Program, samples: Sequence[Sample], outputs: Sequence[Sequence[object]]) -> float:
    """The relative error of a program's outputs to those it has without rounding of values.

    Kernels of ours that round within stay as they are.
    """
    plain = program.copy()
    for node in plain.nodes():
        if _rounds(node, _FAKE):
            node.replace_all_uses_with(node.args[0])  # pyright: ignore[reportArgumentType]
            plain.graph.erase_node(node)
        elif node.target in _PRODUCTS:
            _multiply_floats(plain.graph, node)
    return compare(run_samples(plain, samples), outputs).relative_error


def _multiply_floats(graph: fx.Graph, product: fx.Node) -> None:
    """Let a product of short formats multiply the values as they were before they were rounded, on the same scale."""
    cast = product.args[0]
    while isinstance(cast, fx.Node) and cast.target is not aten.to.dtype:
        cast = cast.args[0]
    q, weight, *scales = product.args
    assert isinstance(cast, fx.Node) and isinstance(cast.args[0], fx.Node)
    if cast.args[1] is not torch.float32:
        value = cast.args[0].args[0]  # before it is clamped
        if nodes.is_call(value, aten.add.Tensor) and nodes.is_call(value.args[0], aten.round.default):
            with graph.inserting_before(cast):
                value = graph.call_function(aten.add.Tensor, (value.args[0].args[0], value.args[1]))
        cast.args = value, torch.float32
    with graph.inserting_before(product):
        weight = graph.call_function(aten.to.dtype, (weight, torch.float32))
        if scales:
            q, weight = (graph.call_function(aten.mul.Tensor, pair) for pair in ((q, scales[0]), (weight, scales[1])))
        found = graph.call_function(aten.matmul.default, (q, weight))
        if scales and scales[2] is not None:
            found = graph.call_function(aten.add.Tensor, (found, scales[2]))
        if scales:
            found = graph.call_function(aten.to.dtype, (found, scales[4]))
    product.replace_all_uses_with(found)
    graph.erase_node(product)


def _stores_whole(node: fx.Node) -> bool:
    """True for a cast of values to bytes, in which a cache may be kept."""
    if not nodes.is_call(node, aten.to.dtype) or not nodes.is_tensor(node.args[0]):
        return False
    floating = nodes.tensor_type(node.args[0]).dtype.is_floating_point
    return floating and nodes.tensor_type(node).dtype in (torch.int8, torch.uint8)


def _rounds(node: fx.Node, operators: set[str]) -> bool:
    return str(node.target) in operators and not (isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr")


def _forced_error(before: Program, after: Program, sample: Sample) -> float:
    known: dict[str, object] = {}
    with torch.no_grad(), kept_state(before):
        wanted = before.run(sample, lambda node, value: known.update({node.name: lasting(node, value)}))
    if after.ranks:
        return _forced_ranks(after, sample, known, wanted)
    values: dict[fx.Node, object] = dict(zip(after.placeholders, sample, strict=True))
    worst = 0.0
    with torch.no_grad(), kept_state(after):
        for node in after.graph.nodes:
            if node.op == "get_attr":
                values[node] = after.weight(str(node.target))
            elif node.op == "call_function":
                values[node] = found = call(node, values.__getitem__)
                name = node.name if node.name in known else nodes.origin(node).replaces
                if name in known and _alike(known[name], found):
                    worst = max(worst, worst_error(known[name], found))
                    values[node] = known[name]
    results = [values[item] if isinstance(item, fx.Node) else item for item in after.output.args[0]]  # pyright: ignore
    return max(worst, compare([wanted], [results]).relative_error)


def _forced_ranks(after: Program, sample: Sample, known: dict[str, object], wanted: list[object]) -> float:
    """The same for a program cut for several ranks, which are given their parts of the values."""
    worst = 0.0

    def force(node: fx.Node, parts: list[object]) -> list[object] | None:
        nonlocal worst
        name = node.name if node.name in known else nodes.origin(node).replaces
        found = after.whole(node, parts, sample)
        if name not in known or not _alike(known[name], found):
            return None
        worst = max(worst, worst_error(known[name], found))
        return after.parts(node, known[name], sample)

    with torch.no_grad(), kept_state(after):
        results = run_ranks(after.graph, after.ranks, sample, force)
    return max(worst, compare([wanted], [results[0]]).relative_error)


def _alike(wanted: object, found: object) -> bool:
    """True for values of one form; where a pass changed the form, what comes behind it is compared."""
    if isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor):
        return wanted.shape == found.shape and wanted.dtype == found.dtype
    return type(wanted) is type(found)
