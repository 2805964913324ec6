"""Tests of lissom.backends.onnx.sparse_attention: block-sparse attention by key blocks and with a mask of all pairs."""

from __future__ import annotations

import re
from functools import cache

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lissom
from lissom.backends.names import input_names
from lissom.backends.onnx.export import export_onnx, save_onnx
from lissom.backends.onnx.variants import ATTENTION, PAIRS, write_variant
from lissom.backends.onnxruntime.variant_search import Timed, affordable_lengths, tell_lengths
from lissom.compiler.verify.divergence import relative_error
from lissom.frontends.capture.export import capture
from lissom.ops import block_sparse_attention
from lissom.ops.blocked_attention import block_sparse_attention_reference
from lissom.ops.pattern import LAYOUT, Condition, Pattern
from tests.support.models import normal, seeded
from tests.support.neighbours import all_but_slow

CAUSAL = Condition(-1, 1, high=0)
FIRST = Condition(0, 1, high=4)
# float32: sums of some hundred terms in another order, and an exponential good to 2e-7.
ALLOWED = 1e-5


def window(left, right, unit=1):
    return Condition(-1, 1, low=-left, high=right, unit=unit)


PATTERNS = {
    "window": Pattern(((window(40, 25),),)),
    "causal window": Pattern(((window(70, 0),),)),
    "window of units": Pattern(((Condition(1, -1, low=-1, high=2, unit=24),),)),
    "window and sinks": Pattern(((window(30, 0),), (CAUSAL, FIRST))),
    "window and global tokens": Pattern(((window(20, 20),), (FIRST,), (Condition(1, 0, high=2),))),
    "fixed": Pattern(((CAUSAL, Condition(-1, 1, low=0, unit=32)), (CAUSAL, Condition(0, 1, low=29, high=31, modulus=32)))),
    "two strides": Pattern(((window(5, 5),), (Condition(0, 1, high=1, modulus=9),), (Condition(0, 1, high=0, modulus=12),))),
    "blocks": Pattern(((LAYOUT,),), 32),
    "causal blocks": Pattern(((LAYOUT, CAUSAL),), 16),
    "blocks and window": Pattern(((LAYOUT,), (window(17, 17),), (FIRST,)), 32),
}


class Sparse(nn.Module):
    """Projections and block-sparse attention; heads that share keys, a bias, and sinks as they are asked for."""

    def __init__(self, pattern, heads=4, groups=2, layout=None, softcap=0.0, with_sinks=False):
        super().__init__()
        self.heads, self.groups, self.softcap = heads, groups, softcap
        self.q, self.k, self.v = (nn.Linear(16, 8 * count) for count in (heads, groups, groups))
        self.out = nn.Linear(8 * heads, 16)
        self.pattern, self.block = pattern.encode(), pattern.block
        self.register_buffer("layout", layout)
        self.sinks = nn.Parameter(torch.randn(1, heads, 1, 1)) if with_sinks else None

    def forward(self, x, bias=None):
        q, k, v = (item(x).unflatten(-1, (-1, 8)).transpose(1, 2) for item in (self.q, self.k, self.v))
        options = {"pattern": self.pattern, "block": self.block, "softcap": self.softcap, "sinks": self.sinks}
        found = block_sparse_attention(q, k, v, bias, self.layout, scale=0.7, **options)
        return self.out(found.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("chosen", [(), (PAIRS,)])
def test_query_that_sees_padding_alone_keeps_to_its_pattern(chosen, tmp_path):
    """The least number hides a key less than minus infinity does: of keys hidden both ways, only the first count."""
    pattern, least = Pattern(((window(1, 0),),)), torch.finfo(torch.float32).min
    bias = torch.tensor([0.0] * 6).index_fill(0, torch.tensor([0, 1, 2]), least).expand(2, 1, 6, 6).contiguous()
    model, inputs = seeded(lambda: Sparse(pattern)).eval(), (normal(2, 6, 16), bias)
    captured = capture(model, inputs, {}, dynamic=False)
    found, _ = write_variant(export_onnx(captured.program, captured.example, decompose=False), chosen)
    session = onnxruntime.InferenceSession(save_onnx(found, tmp_path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    (answer,) = session.run(None, dict(zip(names, (item.numpy() for item in inputs), strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(answer), model(*inputs), rtol=0, atol=ALLOWED)


def layout_of(pattern, heads=1, rows=5, seed=0, dense=()):
    if not any(condition.asks_layout for conditions in pattern.alternatives for condition in conditions):
        return None
    layout = torch.rand(heads, rows, rows, generator=torch.Generator().manual_seed(seed)) < 0.3
    layout[:, list(dense)] = True
    return layout


def exported(model, inputs):
    """The model captured, and exported as ONNX Runtime is given it."""
    found = capture(model, inputs)
    return found, export_onnx(found.program, found.example, decompose=False)


def check(model, inputs, others, folder):
    """Every form of the model against itself, on inputs of these and other sizes."""
    check_exported(model, *exported(model, inputs), [inputs, *others], folder)


def check_exported(model, found, export, samples, folder, **options):
    """The same of a model that is exported already; the graphs of the forms."""
    graphs = []
    for form in ((), (ATTENTION,), (PAIRS,), (PAIRS, ATTENTION)):
        written, _ = write_variant(export, form, **options)
        path = save_onnx(written, folder)
        onnx.checker.check_model(path, full_check=True)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = input_names(found.program)
        for sample in samples:
            (result,) = session.run(None, dict(zip(names, (x.numpy() for x in sample), strict=True)))
            wanted = model(*sample).detach()
            assert relative_error(wanted, torch.tensor(result)) < ALLOWED, (form, [list(x.shape) for x in sample])
        graphs.append(onnx.load(path, load_external_data=False))
    return graphs


@pytest.mark.parametrize("name", all_but_slow(PATTERNS, "causal blocks", "window and sinks", "two strides"))
def test_every_form_gives_what_the_operator_gives(name, tmp_path):
    pattern = PATTERNS[name]
    model = seeded(lambda: Sparse(pattern, layout=layout_of(pattern, dense=(0,))))
    sizes = [(1, 1), (2, 64), (1, 90), (1, 333)]
    check(model, (normal(2, 140, 16),), [(normal(*size, 16, seed=3),) for size in sizes], tmp_path)


@cache
def by_heads(name):
    """A model of this pattern whose heads have layouts of their own where there are any, with its export."""
    pattern = PATTERNS[name]
    model = seeded(lambda: Sparse(pattern, layout=layout_of(pattern, heads=4, dense=(1,))))
    return model, *exported(model, (normal(2, 140, 16),))


# A key and its value take 2 · 2 · 8 · 4 bytes of the two groups of heads.
@pytest.mark.parametrize(
    ("name", "chunk_bytes"),
    [
        pytest.param(name, size, marks=pytest.mark.slow if (name, size) == ("blocks and window", 1) else ())
        for name in ("window", "window and global tokens", "blocks and window")
        for size in (1, 128 * 2 * 140, 2**28)
    ],
)
def test_chunks_of_every_size_give_the_same(name, chunk_bytes, tmp_path):
    """A block at a time, a few, of which the last is not a whole chunk, and all at once; of one sequence and of several."""
    samples = [(normal(2, 140, 16),), *((normal(*size, 16, seed=3),) for size in [(1, 1), (3, 333), (1, 701)])]
    graphs = check_exported(*by_heads(name), samples, tmp_path, chunk_bytes=chunk_bytes)
    assert [sum(node.op_type == "Loop" for node in graph.graph.node) for graph in graphs] == [1, 1, 0, 0]


def test_heads_with_keys_of_their_own(tmp_path):
    pattern = PATTERNS["blocks and window"]
    model = seeded(lambda: Sparse(pattern, layout=layout_of(pattern, heads=4, dense=(2, 4)), with_sinks=True))
    check(model, (normal(2, 140, 16),), [(normal(*size, 16, seed=3),) for size in ((1, 1), (1, 333))], tmp_path)


BIASES = {"padding": (2, 1, 1, 140), "of a head": (1, 4, 1, 140), "of pairs": (1, 1, 140, 140), "of all": (2, 4, 140, 140)}


@pytest.mark.parametrize("heads", all_but_slow([1, 4], 4))
@pytest.mark.parametrize("kind", BIASES)
def test_a_bias_is_gathered_with_the_keys(kind, heads, tmp_path):
    pattern = PATTERNS["blocks and window"]
    model = seeded(lambda: Sparse(pattern, layout=layout_of(pattern, heads=heads, dense=(1,)), softcap=2.0))
    bias = normal(*BIASES[kind], seed=5)
    if kind == "padding":
        bias = torch.arange(140) < torch.tensor([140, 90])[:, None, None, None]
    check(model, (normal(2, 140, 16), bias), [], tmp_path)


def test_a_row_that_sees_nothing_yields_zeros(tmp_path):
    model = seeded(lambda: Sparse(Pattern(((window(30, -10),),))))
    assert torch.equal(model(normal(1, 50, 16))[0, 0], model.out.bias)
    check(model, (normal(1, 150, 16),), [(normal(2, 50, 16),)], tmp_path)


def sizes_of(graph, path, inputs):
    """The elements of the largest value of a call."""
    names = [value.name for node in graph.graph.node for value in [onnx.ValueInfoProto(name=out) for out in node.output]]
    graph = onnx.load(path)
    del graph.graph.output[:]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return max(result.size for result in session.run(None, inputs))


@pytest.mark.parametrize("name", ["window", "causal window", "window and global tokens"])
def test_memory_is_linear_in_the_length(name, tmp_path):
    model = seeded(lambda: Sparse(PATTERNS[name], heads=1, groups=1))
    found, export = exported(model, (normal(1, 140, 16),))
    written, _ = write_variant(export, [ATTENTION])
    path = tmp_path / "whole.onnx"
    onnx.save(onnx.load(save_onnx(written, tmp_path)), path)
    graph = onnx.load(path)
    largest = [sizes_of(graph, path, {input_names(found.program)[0]: normal(1, n, 16).numpy()}) for n in (1280, 2560)]
    # Less than one matrix of pairs, and twice as much at twice the length.
    assert largest[0] < 1280 * 300
    assert largest[1] == 2 * largest[0]


@pytest.mark.slow
def test_report_names_used_form_and_crossover(tmp_path):
    pattern = Pattern(((window(16, 16),),))
    model = seeded(lambda: Sparse(pattern))
    found = lissom.compile(model, normal(1, 1024, 16), backend=lissom.OnnxRuntime(timing_seconds=0.05, threads=1))
    (note,) = (note for note in found.report.history.steps[-1].notes if "block-sparse" in note)
    # Which one is faster here depends on what else the machine does.
    assert re.match(r"block-sparse attention, 1 times, is (by key blocks|with a mask of all pairs): ", note)
    assert all(f" ms with a mask of all pairs at length {length}" in note for length in (1024, 256, 512, 2048))
    found.save(tmp_path / "saved")
    again = lissom.load(tmp_path / "saved")
    x = normal(2, 333, 16)
    assert relative_error(model(x).detach(), again(x)) < ALLOWED


def test_report_says_why_pattern_has_no_key_blocks():
    strided = Pattern(((CAUSAL, Condition(-1, 1, low=0, high=0, modulus=7)),))
    found = lissom.compile(seeded(lambda: Sparse(strided)), normal(1, 50, 16), backend=lissom.OnnxRuntime(timing_seconds=0))
    (note,) = (note for note in found.report.history.steps[-1].notes if "block-sparse" in note)
    assert note == (
        "block-sparse attention is computed with a mask of all pairs, since what a query sees grows with the length, "
        "and not as blocks or single keys that all queries share"
    )


@pytest.mark.parametrize("bias", [None, torch.ones(1, 1, 1, 300, dtype=torch.bool)])
def test_a_length_that_does_not_vary(bias, tmp_path):
    strided = Pattern(((window(20, 0),), (CAUSAL, Condition(-1, 1, low=0, high=0, unit=64, modulus=3))))
    model = seeded(lambda: Sparse(strided))
    given = (normal(1, 300, 16),) if bias is None else (normal(1, 300, 16), bias)
    found = capture(model, given, dynamic=False)
    written, places = write_variant(export_onnx(found.program, found.example, decompose=False), [ATTENTION])
    assert (places[PAIRS], places[ATTENTION]) == (1, 1)
    path = save_onnx(written, tmp_path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, dict(zip(input_names(found.program), (x.numpy() for x in given), strict=True)))
    assert relative_error(model(*given).detach(), torch.tensor(result)) < ALLOWED


def test_reference_is_the_operator():
    q, k, v = normal(3, 1, 2, 300, 8).unbind(0)
    options = {"pattern": PATTERNS["window"].encode(), "block": 64, "scale": 0.3}
    wanted = block_sparse_attention_reference(q, k, v, **options)
    assert relative_error(wanted, block_sparse_attention(q, k, v, **options)) < ALLOWED


def test_where_the_lines_cross():
    found = [Timed(1024, 1.0, 4.0), Timed(256, 0.5, 0.2), Timed(512, 0.7, 0.9)]
    assert tell_lengths(found) == (
        "1 ms and 4 ms with a mask of all pairs at length 1024, 0.5 ms and 0.2 ms with a mask of all pairs at length 256, "
        "0.7 ms and 0.9 ms with a mask of all pairs at length 512; key blocks are faster from between 256 and 512 on"
    )
    assert tell_lengths(found[:1]).endswith("; key blocks are faster at each")
    assert tell_lengths(found[1:2]).endswith("; key blocks are slower at each")


def test_scores_that_take_too_much_memory_are_not_tried():
    found = capture(seeded(lambda: Sparse(PATTERNS["window"])), (normal(1, 140, 16),))
    assert [length for length, _ in affordable_lengths(found.program, [normal(1, 8000, 16)])] == [8000, 2000, 4000]
    assert affordable_lengths(found.program, [normal(1, 9000, 16)]) == []
