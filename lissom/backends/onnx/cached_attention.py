"""Attention over a KV cache in ONNX: one operator that writes the new keys and values and attends to the cache.

`com.microsoft.GroupQueryAttention` writes in place and reads the slots filled so far, where a copy followed by attention reads
the whole cache. It replaces both where the graph shows that this is the same for every input:

- new keys and values go to slots start, start + 1, …, so the last slot tells how many are filled;
- the mask is a conjunction, and one of its conditions is causal.

A sliding window besides the causal condition is an option of the operator; any other mask, such as padding, is added to the
scores. The operator prefills one sequence only, so the sequences of a batch become further heads of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lissom.backends.onnx.attention import CONTRIB, Site, projection, skip_joins
from lissom.backends.onnx.rewriting import constant_of, nodes_of, shape_of, take_over
from lissom.backends.onnx.state import checked_places, dimension_of, is_index_copy
from lissom.backends.onnx.translation import ATTENTION, DOMAIN

_VIEWS = ("Unsqueeze", "Squeeze", "Reshape", "Identity")
_UP_TO, _BEYOND = ("LessOrEqual", "Less"), ("Greater", "GreaterOrEqual")
"""Comparisons with a slot, each with the equivalent comparison with the next slot."""


def fuse_cached_attention(model: ir.Model) -> int:
    """Replace each attention over a KV cache, and the copies into it, with one operator; returns how many."""
    count = 0
    for node in nodes_of(model, DOMAIN, ATTENTION):
        cached = _Cached.of(Site.of(model, node))
        if cached is not None:
            _fuse(model, node, cached)
            count += 1
    if count:
        model.opset_imports[CONTRIB] = 1
    return count


@dataclass(frozen=True)
class _Cached:
    """An attention over a KV cache.

    Attributes:
        keys: the copy of the keys into it.
        values: that of the values.
        repeated: the nodes that repeat its heads.
        window: the sliding window in slots, -1 for none.
        masked: whether there is a further mask.
    """

    site: Site
    keys: ir.Node
    values: ir.Node
    repeated: Sequence[ir.Node]
    window: int
    masked: bool

    @classmethod
    def of(cls, site: Site) -> _Cached | None:
        """The attention over a cache that a node is; None when it is none, or not for every input."""
        if site.sinks is not None or site.softcap or site.causal or not site.zeros or site.mask is None:
            return None
        keys, values = _copy_behind(site.k), _copy_behind(site.v)
        if keys is None or values is None or site.mask.dtype != ir.DataType.BOOL:
            return None
        queries, cache = _numbers(site.q), _numbers(keys[0].outputs[0])
        if len(queries) != 4 or cache != _numbers(values[0].outputs[0]) or [queries[0], queries[3]] != [cache[0], cache[3]]:
            return None
        groups, places = cache[1:3]
        if -1 in (*cache, queries[1]) or queries[1] % groups or not _fits(site.mask, site.q, places):
            return None
        start = _start_of(keys[0].inputs[1])
        if start is None or _start_of(values[0].inputs[1]) is not start:
            return None
        conditions = _conditions(site.mask)
        causal = [condition for condition in conditions if _limit(condition, site, start, places, _UP_TO) == 0]
        others = [condition for condition in conditions if condition not in causal]
        windows = [-offset for condition in others if (offset := _limit(condition, site, start, places, _BEYOND)) is not None]
        if not causal:
            return None
        plain = len(windows) == len(others) and all(window > 0 for window in windows)
        repeated = [*keys[1], *values[1]]
        return cls(site, keys[0], values[0], repeated, min(windows, default=-1) if plain else -1, not plain)


def _fuse(model: ir.Model, node: ir.Node, cached: _Cached) -> None:
    site = cached.site
    batch, heads, _, width = _numbers(site.q)
    groups, places = _numbers(cached.keys.outputs[0])[1:3]
    call = site.write.call
    last = _last_place(site, cached.keys.inputs[1], places)
    total = call("Squeeze", call("Add", last, 1))
    k, v = cached.keys.inputs[2], cached.values.inputs[2]
    past = [cached.keys.inputs[0], cached.values.inputs[0]]
    assert k is not None and v is not None
    inputs: list[ir.Value | None] = [_side_by_side(site, operand) for operand in (site.q, k, v)]
    inputs += [*past, *(call("Cast", scalar, to=int(ir.DataType.INT32)) for scalar in (last, total))]
    if cached.masked:
        inputs += [None, None, None, _bias(site, total, batch, heads)]
    options = {"num_heads": batch * heads, "kv_num_heads": batch * groups, "scale": site.scale}
    if cached.window > 0:
        options["local_window_size"] = cached.window
    result, *present = site.write.op_multi_out("GroupQueryAttention", inputs, options, domain=CONTRIB, num_outputs=3)
    site.write.replace(node, _apart(site, result, batch, heads, width, cached.masked))
    for unused in cached.repeated:
        model.graph.remove(unused, safe=True)
    for copy, state, new in zip((cached.keys, cached.values), past, present, strict=True):
        assert state is not None
        take_over(copy.outputs[0], new)
        # The same elements, with the sequences as further heads.
        state.shape = new.shape = ir.Shape([1, batch * groups, places, width])
        model.graph.remove(copy, safe=True)


def _last_place(site: Site, index: ir.Value | None, places: int) -> ir.Value:
    """The last slot that is written, [1]; reading it from a table of all slots fails for one out of range."""
    assert index is not None
    write, call = site.write, site.write.call
    checked = checked_places(write, call("Reshape", index, -1), places)
    table = call("Gather", write.integers(*range(places)), checked, axis=0)
    return call("Slice", table, -1, int(np.iinfo(np.int64).max))


def _side_by_side(site: Site, value: ir.Value) -> ir.Value:
    """[batch, heads, tokens, head_dim] as [1, tokens, batch · heads · head_dim]."""
    batch, heads, _, width = _numbers(value)
    source = projection(value) if batch == 1 else None
    if source is not None:
        return source
    return site.write.shaped(site.write.call("Transpose", value, perm=(2, 0, 1, 3)), 1, -1, batch * heads * width)


def _bias(site: Site, total: ir.Value, batch: int, heads: int) -> ir.Value:
    """The bias on the scores, [1, heads or 1, tokens, filled slots]; heads of all sequences where their masks differ."""
    assert site.mask is not None
    write, call = site.write, site.write.call
    end = call("Reshape", total, 1)
    seen = call("Slice", site.mask, 0, end, -1)
    bias = call("Where", seen, site.number(0.0), site.number(site.floor))
    sizes = shape_of(site.mask)
    if len(sizes) < 4:
        return call("Unsqueeze", bias, write.integers(*range(4 - len(sizes))))
    if sizes[0] == 1:
        return bias
    tokens = call("Shape", site.q, start=2, end=3)
    return write.shaped(write.expanded(bias, batch, heads, tokens, end), 1, batch * heads, tokens, end)


def _apart(site: Site, joined: ir.Value, batch: int, heads: int, width: int, masked: bool) -> ir.Value:
    """[1, tokens, batch · heads · head_dim] as [batch, heads, tokens, head_dim], zeros for a fully masked query."""
    write, call = site.write, site.write.call
    visible = site.visible() if masked else None
    if batch > 1:
        result = call("Transpose", write.shaped(joined, -1, batch, heads, width), perm=(1, 2, 0, 3))
        return result if visible is None else call("Mul", result, visible)
    if visible is not None:
        flat = call("Squeeze", visible, 1) if len(shape_of(site.mask)) == 4 else visible
        joined = call("Mul", joined, flat)
    joined.type, joined.shape = site.q.type, ir.Shape([1, shape_of(site.q)[2], heads * width])
    apart = write.shaped(joined, 1, -1, heads, width)
    skip_joins(site.result, joined)
    return call("Transpose", apart, perm=(0, 2, 1, 3))


def _copy_behind(value: ir.Value) -> tuple[ir.Node, list[ir.Node]] | None:
    """The copy into a state that keys or values come from, and the nodes that repeat its heads; None with other readers."""
    repeated: list[ir.Node] = []
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer()
        if node is None or node.op_type != op_type or node.inputs[0] is None:
            break
        if len(list(value.uses())) != 1 or value.is_graph_output():
            return None
        repeated.append(node)
        value = node.inputs[0]
    copy = value.producer()
    if copy is None or not is_index_copy(copy) or dimension_of(copy) != 2 or len(repeated) not in (0, 3):
        return None
    if repeated:
        batch, groups, *rest = shape_of(value)
        if list(shape_of(repeated[2].outputs[0])) != [batch, groups, 1, *rest]:
            return None
    state = copy.inputs[0]
    alone = len(list(value.uses())) == 1 and value.is_graph_output()
    if state is None or not alone or not state.is_graph_input() or len(list(state.uses())) != 1:
        return None
    return copy, repeated


def _start_of(places: ir.Value | None) -> ir.Value | None:
    """The first of slots start, start + 1, …; None for slots that may not be consecutive."""
    node = _seen_through(places).producer() if places is not None else None
    if node is None or node.op_type != "Add":
        return None
    for counted, start in (node.inputs, node.inputs[::-1]):
        producer = counted.producer() if counted is not None else None
        if producer is None or producer.op_type != "Range" or start is None:
            continue
        first, step = constant_of(producer.inputs[0]), constant_of(producer.inputs[2])
        if first is not None and step is not None and first == 0 and step == 1 and list(shape_of(start)) in ([], [1]):
            return _seen_through(start)
    return None


def _seen_through(value: ir.Value) -> ir.Value:
    """The value before reshapes, for a value with at most one dimension larger than 1."""
    node = value.producer()
    while node is not None and node.op_type in _VIEWS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _conditions(mask: ir.Value) -> list[ir.Value]:
    """The conditions whose conjunction a mask is, without those that are always true."""
    node = mask.producer()
    constant = constant_of(mask)
    if constant is not None and bool(constant.all()):
        return []
    if node is not None and node.op_type == "And" and None not in node.inputs:
        return [condition for operand in node.inputs if operand is not None for condition in _conditions(operand)]
    source = node.inputs[0] if node is not None and node.op_type in ("Expand", "Unsqueeze", "Identity") else None
    if source is not None and (not shape_of(source) or list(shape_of(source)[-2:]) == list(shape_of(mask)[-2:])):
        return _conditions(source)
    return [mask]


def _comparison(condition: ir.Value, places: int) -> tuple[str, ir.Value] | None:
    """The comparison of slot numbers with a value, and that value; None for another condition."""
    node = condition.producer()
    turned = {"LessOrEqual": "GreaterOrEqual", "GreaterOrEqual": "LessOrEqual", "Less": "Greater", "Greater": "Less"}
    if node is None or node.op_type not in turned:
        return None
    left, right = node.inputs
    assert left is not None and right is not None
    if _are_places(left, places):
        return node.op_type, right
    return (turned[node.op_type], left) if _are_places(right, places) else None


def _are_places(value: ir.Value, places: int) -> bool:
    """True for 0, 1, … along the last dimension."""
    constant = constant_of(value)
    return constant is not None and constant.shape[-1:] == (places,) and np.array_equal(constant.ravel(), np.arange(places))


def _limit(condition: ir.Value, site: Site, start: ir.Value, places: int, operators: tuple[str, str]) -> int | None:
    """d, where the condition compares a slot with the query's own slot + d; None for another condition.

    Args:
        operators: that comparison, and the equivalent one with d + 1: `_UP_TO` for place ≤ own + d, `_BEYOND` for >.
    """
    comparison = _comparison(condition, places)
    shift = _shift(comparison[1], site, start) if comparison is not None else None
    if comparison is None or shift is None or comparison[0] not in operators:
        return None
    return shift - operators.index(comparison[0])


def _shift(value: ir.Value, site: Site, start: ir.Value) -> int | None:
    """d, where a value of [..., tokens, 1] is each query's own slot + d; None for another value."""
    sizes = shape_of(value)
    if len(sizes) < 2 or list(sizes[-2:]) != [shape_of(site.q)[2], 1] or any(size != 1 for size in sizes[:-2]):
        return None
    if _start_of(value) is start:
        return 0
    node = value.producer()
    if node is None or node.op_type not in ("Sub", "Add") or node.inputs[0] is None:
        return None
    number = constant_of(node.inputs[1])
    if number is None or number.size != 1 or number.ndim > len(sizes) or _start_of(node.inputs[0]) is not start:
        return None
    return int(number.item()) if node.op_type == "Add" else -int(number.item())


def _fits(mask: ir.Value, q: ir.Value, places: int) -> bool:
    """True for a mask of [1 or batch, 1, tokens, places], or of its last dimensions."""
    batch, _, tokens, _ = shape_of(q)
    sizes = list(shape_of(mask))
    return sizes[-2:] == [tokens, places] and [1] * (4 - len(sizes)) + sizes[:-2] in ([1, 1], [batch, 1])


def _numbers(value: ir.Value) -> list[int]:
    """The shape of a value, with free sizes as -1."""
    return [size if isinstance(size, int) else -1 for size in shape_of(value)]
