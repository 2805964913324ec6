"""The rules of placements: what each says, that ranks compute what it says, and that DTensor says the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx

import lissom.ops  # noqa: F401
from lissom.compiler.ir.placement import PARTIAL, REPLICATED, Placed, Span, local_part, sharded, whole_of
from lissom.compiler.parallel.rules.base import Outcome, Reading
from lissom.compiler.parallel.rules.table import RULES, outcome, rule_of
from lissom.compiler.verify.divergence import relative_error
from tests.support.harness import Calls, capture_model
from tests.support.models import normal

WORLD_SIZES = 2
R, P = REPLICATED, PARTIAL


def cut(dim: int, size: int, inner: int = 1, outer: int = 1) -> Placed:
    """A value sharded in two along a dimension, seen as [outer, size, inner]."""
    return sharded((dim, (Span(outer, size, inner, WORLD_SIZES),)))


def packed(dim: int, *sizes: int) -> Placed:
    """A value sharded in two within each of the parts of a dimension."""
    return sharded((dim, tuple(Span(1, size, 1, WORLD_SIZES) for size in sizes)))


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 4


@dataclass(frozen=True)
class Row:
    """One call: the operator, its tensors and how they lie, how the result has to lie, and how arguments are wanted.

    sized: whether the call has sizes in it that `partition` would correct, so that ranks cannot run it as it is.
    """

    name: str
    function: Callable[..., Any]
    tensors: tuple[torch.Tensor, ...]
    have: tuple[Placed, ...]
    result: Placed | tuple[Placed, ...]
    wants: dict[int, Placed] = field(default_factory=dict)
    sized: bool = False


X = normal(2, 4, 6)
W = normal(8, 6, seed=1)
HEADS = normal(2, 4, 3, 8, seed=2)
GROUPS = normal(2, 2, 3, 8, seed=3)
STEPS, KEYS, RATES = normal(2, 3, 4, 8, seed=4), normal(2, 3, 2, 8, seed=5), normal(2, 3, 4, seed=6).sigmoid()
F = torch.nn.functional
attend = F.scaled_dot_product_attention
rotary, scan = torch.ops.lissom.rotary, torch.ops.lissom.selective_scan


def delta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor) -> Any:
    """The gated delta rule, [batch, tokens, heads, width]."""
    return torch.ops.lissom.gated_delta_rule(q, k, v, decay, beta, scale=0.5, normalizes=True)


def int8(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Stored integers turned back."""
    return torch.ops.lissom.dequantize(q, scale, format="int8", dtype=torch.float32)


def int4(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same, two in a byte."""
    return torch.ops.lissom.dequantize(q, scale, format="int4", dtype=torch.float32)


ROWS = [
    # Element by element.
    Row("add", lambda x, y: x + y, (X, X), (cut(2, 6), cut(2, 6)), cut(2, 6)),
    Row("add, broadcast", lambda x, y: x + y, (X, X[0, 0]), (cut(2, 6), R), cut(2, 6), {1: cut(0, 6)}),
    Row("add, one whole", lambda x, y: x + y, (X, X), (cut(1, 4), R), cut(1, 4), {1: cut(1, 4)}),
    Row("add, size 1", lambda x, y: x + y, (X, X[..., :1]), (cut(2, 6), R), cut(2, 6)),
    Row("add, sharded otherwise", lambda x, y: x + y, (X, X), (cut(2, 6), cut(1, 4)), R, {0: R, 1: R}),
    Row("add, sums", lambda x, y: x + y, (X, X), (P, P), P),
    Row("add, a sum and a whole", lambda x, y: x + y, (X, X), (P, R), R, {0: R}),
    Row("mul, a sum", lambda x, y: x * y, (X, X), (P, R), P),
    Row("mul, a sum and a part", lambda x, y: x * y, (X, X), (P, cut(2, 6)), cut(2, 6), {0: cut(2, 6)}),
    Row("div, by a sum", lambda x, y: x / y, (X, X), (R, P), R, {1: R}),
    Row("silu", F.silu, (X,), (cut(2, 6),), cut(2, 6)),
    Row("silu, a sum", F.silu, (X,), (P,), R, {0: R}),
    Row("neg, a sum", torch.neg, (X,), (P,), P),
    Row("where", lambda x, y: torch.where(x > 0, x, y), (X, X), (cut(1, 4), cut(1, 4)), cut(1, 4)),
    Row("clone, a sum", torch.clone, (X,), (P,), P),
    # Products.
    Row("linear by columns", F.linear, (X, W), (R, cut(0, 8)), cut(2, 8)),
    Row("linear by columns, bias", F.linear, (X, W, W[:, 0]), (R, cut(0, 8), R), cut(2, 8), {2: cut(0, 8)}),
    Row("linear by rows", F.linear, (X, W), (cut(2, 6), cut(1, 6)), P),
    Row("linear by rows, bias", F.linear, (X, W, W[:, 0]), (cut(2, 6), cut(1, 6), R), P, {2: P}),
    Row("linear by rows, x whole", F.linear, (X, W), (R, cut(1, 6)), P, {0: cut(2, 6)}),
    Row("linear, a part meets columns", F.linear, (X, W), (cut(2, 6), cut(0, 8)), P, {1: cut(1, 6)}),
    Row("linear, positions meet columns", F.linear, (X, W), (cut(1, 4), cut(0, 8)), cut(2, 8), {0: R}),
    Row("linear, a sum", F.linear, (X, W), (P, R), R, {0: R}),
    Row("addmm by rows", lambda b, x, w: torch.addmm(b, x, w), (W[:6, 0], W, normal(6, 6)),
        (R, cut(1, 6), cut(0, 6)), P, {0: P}),
    Row("matmul by columns", torch.matmul, (X, W.T.contiguous()), (R, cut(1, 8)), cut(2, 8)),
    Row("matmul, batches", torch.matmul, (HEADS, HEADS.mT.contiguous()), (cut(1, 4), cut(1, 4)), cut(1, 4)),
    Row("matmul, rows and batches", torch.matmul, (normal(4, 6), normal(2, 6, 4)), (cut(0, 4), cut(0, 2)), R, {0: R, 1: R}),
    Row("matmul by itself", lambda x: x @ x, (normal(4, 4),), (cut(0, 4),), R, {0: R}),
    Row("bmm", torch.bmm, (X, X.mT.contiguous()), (cut(0, 2), R), cut(0, 2), {1: cut(0, 2)}),
    Row(
        "grouped product by columns", torch.ops.lissom.grouped_product, (X[0], normal(2, 6, 8), torch.tensor([1, 4])),
        (R, cut(2, 8), R), cut(1, 8),
    ),
    Row(
        "grouped product by rows", torch.ops.lissom.grouped_product, (X[0], normal(2, 6, 8), torch.tensor([1, 4])),
        (cut(1, 6), cut(1, 6), R), P,
    ),
    Row("embedding by rows", lambda i, t: F.embedding(i, t), (ids(2, 3), W), (R, cut(0, 8)), P, sized=True),
    Row("embedding by pairs of rows", lambda i, t: F.embedding(i, t), (ids(2, 3), W), (R, cut(0, 4, 2)), R, {1: R}),
    Row("embedding by columns", lambda i, t: F.embedding(i, t), (ids(2, 3), W), (R, cut(1, 6)), cut(2, 6)),
    # Attention, rotation.
    Row("attention", attend, (HEADS, HEADS, HEADS), (cut(1, 4), cut(1, 4), cut(1, 4)), cut(1, 4)),
    Row("attention, k whole", attend, (HEADS, HEADS, HEADS), (cut(1, 4), R, cut(1, 4)), cut(1, 4), {1: cut(1, 4)}),
    Row("attention, positions", attend, (HEADS, HEADS, HEADS), (cut(2, 3), R, R), R, {0: R}),
    Row(
        "attention, groups", lambda q, k, v: attend(q, k, v, enable_gqa=True), (HEADS, GROUPS, GROUPS),
        (cut(1, 4), cut(1, 2), cut(1, 2)), cut(1, 4),
    ),
    Row("attention, a mask", attend, (HEADS, HEADS, HEADS, normal(1, 4, 3, 3)),
        (cut(1, 4), cut(1, 4), cut(1, 4), R), cut(1, 4), {3: cut(1, 4)}),
    Row("lissom.attention", lambda q, k, v: torch.ops.lissom.attention(q, k, v, scale=0.3, softcap=2.0),
        (HEADS, HEADS, HEADS), (cut(1, 4),) * 3, cut(1, 4)),
    Row("rotary", lambda x, c, s: rotary(x, c, s, interleaved=False),
        (HEADS, normal(1, 1, 3, 8), normal(1, 1, 3, 8)), (cut(1, 4), R, R), cut(1, 4)),
    Row("rotary, pairs", lambda x, c, s: rotary(x, c, s, interleaved=False),
        (HEADS, normal(1, 1, 3, 8), normal(1, 1, 3, 8)), (cut(3, 8), R, R), R, {0: R}),
    # Recurrences: tokens are read whole; keys that several heads share go with them, or are whole.
    Row("delta rule, heads", delta, (STEPS, STEPS, STEPS, RATES, RATES), (cut(2, 4),) * 5, (cut(2, 4), cut(1, 4))),
    Row("delta rule, gates whole", delta, (STEPS, STEPS, STEPS, RATES, RATES), (cut(2, 4), cut(2, 4), cut(2, 4), R, R),
        (cut(2, 4), cut(1, 4)), {3: cut(2, 4), 4: cut(2, 4)}),
    Row("delta rule, groups", delta, (KEYS, KEYS, STEPS, RATES, RATES), (R, R, cut(2, 4), R, R), (R, R), {2: R}),
    Row("delta rule, tokens", delta, (KEYS, KEYS, STEPS, RATES, RATES), (R, R, cut(1, 3), R, R), (R, R), {2: R}),
    Row("scan, channels", scan, (STEPS, RATES, RATES[0, 0], KEYS, KEYS), (cut(3, 8), R, R, R, R), (cut(3, 8), cut(2, 8))),
    Row("scan, a sum", scan, (STEPS, RATES, RATES[0, 0], KEYS, KEYS), (P, R, R, R, R), (R, R), {0: R}),
    # What reads a dimension whole.
    Row("softmax", lambda x: x.softmax(-1), (X,), (cut(1, 4),), cut(1, 4)),
    Row("softmax over parts", lambda x: x.softmax(-1), (X,), (cut(2, 6),), R, {0: R}),
    Row("cumsum over parts", lambda x: x.cumsum(1), (X,), (cut(1, 4),), R, {0: R}),
    Row("topk", lambda x: x.topk(2), (X,), (cut(1, 4),), (cut(1, 4), cut(1, 4))),
    Row("layer norm", lambda x, w: F.layer_norm(x, [6], w), (X, W[0]), (cut(1, 4), R), cut(1, 4)),
    Row("layer norm over parts", lambda x, w: F.layer_norm(x, [6], w), (X, W[0]), (cut(2, 6), R), cut(2, 6), {1: cut(0, 6)},
        sized=True),
    Row("layer norm over two dims", lambda x: F.layer_norm(x, [4, 6]), (X,), (cut(2, 6),), R, {0: R}),
    Row("norm of a packed row", lambda x: F.rms_norm(x, [8]), (normal(2, 8),), (packed(1, 2, 6),), R, {0: R}),
    Row("a kernel a channel", lambda x, w, b: F.conv1d(x, w, b, groups=4), (X, normal(4, 1, 3), W[:4, 0]), (cut(1, 4), R, R),
        cut(1, 4), {1: cut(0, 4), 2: cut(0, 4)}, sized=True),
    Row("kernels are sharded", lambda x, w: F.conv2d(x, w, groups=4), (normal(2, 4, 5, 5), normal(4, 1, 3, 3)), (R, cut(0, 4)),
        cut(1, 4), {0: cut(1, 4)}, sized=True),
    Row("a convolution", F.conv1d, (X, normal(4, 4, 3)), (cut(1, 4), R), R, {0: R}),
    Row("rms norm", lambda x, w: F.rms_norm(x, [6], w), (X, W[0]), (cut(1, 4), R), cut(1, 4)),
    # Reductions.
    Row("sum over parts", lambda x: x.sum(-1), (X,), (cut(2, 6),), P),
    Row("sum beside parts", lambda x: x.sum(1), (X,), (cut(2, 6),), cut(1, 6)),
    Row("sum over uneven parts", lambda x: x.sum(1), (normal(2, 3),), (cut(1, 3),), R, {0: R}),
    Row("sum of a sum", lambda x: x.sum(1), (X,), (P,), P),
    Row("mean over parts", lambda x: x.mean(-1), (X,), (cut(2, 6),), R, {0: R}),
    Row("amax, kept", lambda x: x.amax(1, keepdim=True), (X,), (cut(2, 6),), cut(2, 6)),
    # Dimensions moved, merged, split, repeated.
    Row("permute", lambda x: x.permute(2, 0, 1), (X,), (cut(2, 6),), cut(0, 6)),
    Row("transpose", lambda x: x.transpose(1, 2), (X,), (cut(2, 6),), cut(1, 6)),
    Row("transpose, a sum", lambda x: x.transpose(1, 2), (X,), (P,), P),
    Row("unsqueeze", lambda x: x.unsqueeze(1), (X,), (cut(2, 6),), cut(3, 6)),
    Row("squeeze", lambda x: x.squeeze(1), (X[:, :1],), (cut(2, 6),), cut(1, 6)),
    Row("select", lambda x: x[:, 0], (X,), (cut(2, 6),), cut(1, 6)),
    Row("select of parts", lambda x: x[:, 0], (X,), (cut(1, 4),), R, {0: R}),
    Row("split off", lambda x: x.reshape(2, 4, 3, 2), (normal(2, 4, 6),), (cut(2, 3, 2),), cut(2, 3), sized=True),
    Row("merge", lambda x: x.reshape(2, 4, 24), (normal(2, 4, 4, 6),), (cut(2, 4),), cut(2, 4, 6), sized=True),
    Row("merge behind", lambda x: x.reshape(8, 6), (normal(2, 4, 6),), (cut(2, 6),), cut(1, 6), sized=True),
    Row("merge in front", lambda x: x.reshape(8, 6), (normal(2, 4, 6),), (cut(1, 4),), cut(0, 4, 1, 2), sized=True),
    Row("split within", lambda x: x.reshape(2, 4, 3, 2), (normal(2, 4, 6),), (cut(2, 6),), R, {0: R}, sized=True),
    Row("flatten", lambda x: x.flatten(1), (normal(2, 4, 6),), (cut(1, 4),), cut(1, 4, 6), sized=True),
    Row("unflatten", lambda x: x.unflatten(2, (2, 3)), (normal(2, 4, 6),), (cut(2, 2, 3),), cut(2, 2), sized=True),
    Row("expand", lambda x: x.expand(2, 4, 6), (X[:, :1],), (cut(2, 6),), cut(2, 6), sized=True),
    Row("repeat", lambda x: x.repeat(1, 2, 1), (X,), (cut(2, 6),), cut(2, 6)),
    Row("repeat of parts", lambda x: x.repeat(1, 2, 1), (X,), (cut(1, 4),), R, {0: R}),
    Row("repeat interleave", lambda x: x.repeat_interleave(2, 1), (X,), (cut(1, 4),), cut(1, 4, 2)),
    Row("cat beside parts", lambda x, y: torch.cat([x, y], 1), (X, X), (cut(2, 6), cut(2, 6)), cut(2, 6)),
    Row("cat of parts", lambda x, y: torch.cat([x, y], -1), (X, X), (cut(2, 6), cut(2, 6)), packed(2, 6, 6)),
    Row("stack", lambda x, y: torch.stack([x, y], 1), (X, X), (cut(2, 6), cut(2, 6)), cut(3, 6)),
    Row("split of parts", lambda x: x.split(3, -1), (X,), (packed(2, 3, 3),), (cut(2, 3), cut(2, 3)), sized=True),
    Row("split within a part", lambda x: x.split(3, -1), (X,), (cut(2, 6),), (R, R), {0: R}, sized=True),
    Row("unbind", lambda x: x.unbind(1), (X,), (cut(2, 6),), (cut(1, 6),) * 4),
    Row("slice", lambda x: x[:, 1:3], (X,), (cut(2, 6),), cut(2, 6)),
    Row("slice of a packed one", lambda x: x[..., 3:], (X,), (packed(2, 3, 3),), cut(2, 3), sized=True),
    Row("slice within a part", lambda x: x[..., 2:], (X,), (cut(2, 6),), R, {0: R}, sized=True),
    Row("slice, every other", lambda x: x[..., 1::2], (X,), (cut(2, 3, 2),), cut(2, 3)),
    Row("pad", lambda x: F.pad(x, (0, 0, 1, 0)), (X,), (cut(2, 6),), cut(2, 6)),
    Row("pad of parts", lambda x: F.pad(x, (0, 1)), (X,), (cut(2, 6),), R, {0: R}),
    # Look-ups.
    Row("index select", lambda x, i: x.index_select(1, i), (X, ids(3)), (cut(2, 6), R), cut(2, 6)),
    Row("index", lambda x, i: x[:, i], (X, ids(3)), (cut(2, 6), R), cut(2, 6)),
    Row("index of parts", lambda x, i: x[:, i], (X, ids(3)), (cut(1, 4), R), R, {0: R}),
    Row("index, a sum", lambda x, i: x[:, i], (X, ids(3)), (P, R), P),
    Row("taken along", lambda x, i: x.take_along_dim(i, 1), (X, ids(2, 4, 6)), (cut(2, 6), R), cut(2, 6), {1: cut(2, 6)}),
    Row("gather", lambda x, i: x.gather(1, i), (X, ids(2, 4, 6)), (cut(2, 6), R), cut(2, 6), {1: cut(2, 6)}),
    Row("index copy", lambda x, i, y: x.index_copy(1, i, y), (X, ids(2), X[:, :2]),
        (cut(2, 6), R, R), cut(2, 6), {2: cut(2, 6)}),
    # Short formats.
    Row("dequantize by channel", int8,
        (ids(4, 6).to(torch.int8), W[:4, :1].abs()), (cut(0, 4), R), cut(0, 4), {1: cut(0, 4)}),
    Row("dequantize by group", int8,
        (ids(4, 8).to(torch.int8), W[:4, :4].abs().contiguous()), (cut(1, 8), R), cut(1, 8), {1: cut(1, 4)}),
    Row("dequantize, four bits", int4,
        (ids(4, 4).to(torch.uint8), W[:4, :1].abs()), (cut(1, 4), R), cut(1, 4, 2)),
    Row("dequantize, a group sharded", int8,
        (ids(4, 6).to(torch.int8), W[:4, :3].abs().contiguous()), (cut(1, 6), R), R, {0: R}),
    Row("fake quantize", lambda x, s: torch.ops.lissom.fake_quantize(x, s, format="int8"),
        (X, W[0, 0].abs()), (cut(2, 6), R), cut(2, 6)),
    Row("round a token", lambda x: torch.ops.lissom.fake_quantize_dynamic(x, format="uint8"), (X,), (cut(1, 4),), cut(1, 4)),
    # `partition` finds the range of all parts.
    Row("round a token in parts", lambda x: torch.ops.lissom.fake_quantize_dynamic(x, format="uint8"),
        (X,), (cut(2, 6),), cut(2, 6), sized=True),
    Row("round a tensor in parts", lambda x: torch.ops.lissom.fake_quantize_dynamic(x, format="int8", granularity="tensor"),
        (X,), (cut(1, 4),), R, {0: R}),
    # No rule.
    Row("no rule", lambda x: torch.flip(x, [1]), (X,), (cut(2, 6),), R, {0: R}),
]  # fmt: skip


def one_call(row: Row) -> tuple[fx.Node, list[fx.Node], Outcome]:
    """The last call of the row's function, what it reads in the order of the row's tensors, and the outcome of its rule."""
    program = capture_model(_Weights(row), torch.zeros(1), dynamic=False).program
    calls = program.nodes()
    found = next(node for node in reversed(calls) if "getitem" not in str(node.target))
    reads = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    placed: dict[fx.Node, Any] = dict.fromkeys(program.graph.nodes, REPLICATED)
    values = [reads[f"w{index}"] for index in range(len(row.tensors))]
    placed |= dict(zip(values, row.have, strict=True))
    read = Reading(placed)
    for node in calls:
        if node is not found:
            placed[node] = outcome(node, read).result
    return found, values, outcome(found, read)


class _Weights(torch.nn.Module):
    """The row's function of buffers, so that one capture serves any number of tensors."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.function, self.count = row.function, len(row.tensors)
        for index, tensor in enumerate(row.tensors):
            self.register_buffer(f"w{index}", tensor.clone())

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(*(getattr(self, f"w{index}") for index in range(self.count)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rule(row: Row) -> None:
    _node, values, found = one_call(row)
    assert found.result == row.result
    assert {item: found.wants[item] for item in values if item in found.wants} == {
        values[i]: want for i, want in row.wants.items()
    }


@pytest.mark.parametrize("row", [row for row in ROWS if not row.sized], ids=lambda row: row.name)
def test_ranks_compute_what_the_rule_says(row: Row) -> None:
    wanted = row.function(*row.tensors)
    have = [row.wants.get(index, placed) for index, placed in enumerate(row.have)]
    parts = [
        row.function(*(local_part(tensor, placed, rank) for tensor, placed in zip(row.tensors, have, strict=True)))
        for rank in range(WORLD_SIZES)
    ]
    if not isinstance(row.result, tuple):
        wanted, parts = (wanted,), [(part,) for part in parts]
    placed = row.result if isinstance(row.result, tuple) else (row.result,)
    for index, (whole, how) in enumerate(zip(wanted, placed, strict=True)):
        found = whole_of([part[index] for part in parts], how)
        # Sums of a few terms in another order.
        assert relative_error(whole, found) <= 1e-6


def test_every_rule_is_tested() -> None:
    called = {str(rule_of(one_call(row)[0])) for row in ROWS}
    left = {str(rule) for rule in RULES.values()} - called
    # State is written in programs with a cache, which `test_partition.py` has; sums over all are as those over one dimension.
    assert {name.split()[1] for name in left} <= {"written", "getitem", "over.<locals>.rule"}


@pytest.fixture(scope="module")
def mesh() -> Generator[Any]:
    """Two ranks of which only this process exists."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=WORLD_SIZES, store=FakeStore())
    yield init_device_mesh("cpu", (WORLD_SIZES,))
    torch.distributed.destroy_process_group()


_AGREED = [
    "add", "add, sums", "silu", "linear by columns", "linear by rows", "matmul by columns", "matmul, batches", "softmax",
    "layer norm", "sum over parts", "sum beside parts", "permute", "transpose", "unsqueeze", "select", "merge behind", "merge",
    "cat beside parts", "embedding by columns", "neg, a sum", "amax, kept", "index select",
]  # fmt: skip


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in _AGREED], ids=lambda row: row.name)
def test_dtensor_says_the_same(row: Row, mesh: Any) -> None:
    from torch.distributed.tensor import DTensor

    _node, _, found = one_call(row)
    assert not found.wants
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [
            DTensor.from_local(local_part(tensor, placed, 0).contiguous(), mesh, placed.placements)
            for tensor, placed in zip(row.tensors, row.have, strict=True)
        ]
        result = row.function(*tensors)
    assert isinstance(found.result, Placed)
    assert result.placements == found.result.placements


def test_a_call_without_tensors_is_whole() -> None:
    program = capture_model(Calls(lambda x: x + torch.arange(x.shape[1])), X[0]).program
    (counted,) = [node for node in program.nodes() if "arange" in str(node.target)]
    assert outcome(counted, Reading(dict.fromkeys(program.graph.nodes, REPLICATED))).result == REPLICATED
