"""Tests of lissom.measure.roofline: times by hand."""

import dataclasses

import pytest
import torch

from lissom.compiler.analysis.cost import Cost, cost, total_cost
from lissom.errors import UnsupportedError
from lissom.measure.machine import Ceiling
from lissom.measure.roofline import node_seconds, roofline_seconds
from lissom.ops import quantized_linear, quantized_linear_norm
from lissom.ops.native import load_kernels
from tests.measure.test_machine import ceilings, example
from tests.support import captures
from tests.support.models import FeedForward, captured, normal

MACHINE = example()
"""100 GFLOP/s in float32, 200 in bfloat16, no int8, 10 GB/s."""


@pytest.mark.parametrize(
    ("found", "dtype", "seconds"),
    [
        (Cost(flops=200 * 10**9, read_bytes=10**9), torch.float32, 2.0),
        (Cost(flops=200 * 10**9, read_bytes=10**9), torch.bfloat16, 1.0),
        (Cost(flops=200 * 10**9, read_bytes=10**9), torch.float16, 1.0),
        (Cost(flops=200 * 10**9, read_bytes=10**9), torch.int8, 2.0),
        (Cost(flops=10**9, read_bytes=20 * 10**9, written_bytes=10 * 10**9), torch.float32, 3.0),
        (Cost(), torch.float32, 0.0),
    ],
    ids=["products", "bfloat16", "float16 as bfloat16", "int8 without a ceiling", "memory", "nothing"],
)
def test_the_larger_of_two_times(found, dtype, seconds):
    assert roofline_seconds(found, MACHINE, dtype) == pytest.approx(seconds)


def test_measured_int8_has_its_own_ceiling():
    fast = example(cpu=ceilings().__class__(**vars(ceilings()) | {"int8_gops": Ceiling(400.0, 390.0, 410.0, "")}))
    assert roofline_seconds(Cost(flops=200 * 10**9), fast, torch.uint8) == pytest.approx(0.5)


def test_a_device_has_its_own_roof():
    card = ceilings("a card")
    doubled = {"memory_gb_per_second": Ceiling(20.0, 19.0, 21.0, "")}
    both = example(devices=(card.__class__(**vars(card) | doubled),))
    moved = Cost(read_bytes=10 * 10**9)
    assert roofline_seconds(moved, both, torch.float32) == pytest.approx(1.0)
    assert roofline_seconds(moved, both, torch.float32, device=torch.device("cuda", 0)) == pytest.approx(0.5)


def test_a_symbolic_cost_has_no_time():
    with pytest.raises(UnsupportedError, match=r"operations and .* bytes takes no known time; give numbers for its sizes"):
        roofline_seconds(total_cost(captured("feed_forward")), MACHINE, torch.float32)


def test_node_is_timed_in_type_it_computes_in():
    program = captured("feed_forward")
    (up, _) = program.nodes(torch.ops.aten.linear.default)
    found = cost(program, {"batch": 1000, "sequence": 1000})[up]
    assert node_seconds(up, found, MACHINE) == pytest.approx(max(found.flops / 100e9, found.bytes / 10e9))


def test_int8_layer_with_quantized_input_has_int8_roof():
    fast = example(cpu=dataclasses.replace(ceilings(), int8_gops=Ceiling(400.0, 390.0, 410.0, "")))
    compiled = captures.compile(FeedForward(64, 128), normal(2, 5, 64), checks="off", passes="quantize")
    layers = compiled.program.nodes(quantized_linear, quantized_linear_norm)
    assert load_kernels() or layers
    for node in layers:
        assert node_seconds(node, Cost(flops=400 * 10**9), fast) == pytest.approx(1.0)
