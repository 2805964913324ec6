"""Tests of lissom.inspect.hot_layers: sums by hand, and the table of a lowered model."""

import pytest

from lissom.compiler.analysis.cost import costs_on
from lissom.inspect.hot_layers import LayerTime, LayerTimes, layer_times, roof_share
from lissom.inspect.kernels import Kernel
from lissom.measure.roofline import node_seconds
from tests.measure.test_machine import example
from tests.support import captures
from tests.support.models import tiny_bert

MACHINE = example()
PACKED, NORM = Kernel("Lissom", "packed_linear", "avx2, float32"), Kernel("PyTorch", "layer_norm", "float32")


def layer(milliseconds: float, roof_ms: float | None = 0.5, kernel: Kernel = PACKED, count: int = 2) -> LayerTime:
    return LayerTime("encoder.layer.*.dense", "64 × 384 → 1536", kernel, count, milliseconds, roof_ms)


def test_hot_layers_are_the_fewest_that_take_80_percent():
    found = LayerTimes("Model on eager", (layer(5.0), layer(3.0), layer(1.0), layer(1.0)))
    assert found.whole_ms == 10.0
    assert found.hot == found.layers[:2]
    assert found.share(found.hot) == pytest.approx(0.8)


def test_there_are_eight_at_most_and_none_without_time():
    assert len(LayerTimes("Model", (layer(1.0),) * 20).hot) == 8
    empty = LayerTimes("Model", ())
    assert (empty.hot, empty.summary) == ((), "hot layers: none take 0 % of the time")


def test_share_of_roofline_is_that_of_layers_together():
    assert roof_share([layer(4.0, 1.0), layer(1.0, 1.0)]) == pytest.approx(0.4)
    assert roof_share([layer(4.0, None)]) is None
    assert roof_share([layer(4.0, 0.0)]) is None


def test_a_summary_counts_the_kernels():
    found = LayerTimes("Model", (layer(5.0, 2.5, count=12), layer(2.0, 1.0, count=12), layer(1.5, 0.5, NORM, 1), layer(1.5)))
    assert found.summary == (
        "hot layers: 24 × packed_linear, 1 × layer_norm take 85 % of the time and reach 47 % of the roofline"
    )
    assert LayerTimes("Model", (layer(1.0, None),)).summary == "hot layers: 2 × packed_linear take 100 % of the time"


def test_the_table_names_layers_kernels_shapes_and_shares():
    found = LayerTimes("Model on eager, batch 2", (layer(8.0, 4.0), layer(1.0), layer(1.0)))
    shown = [" ".join(line.split()) for line in str(found).splitlines()]
    assert shown[0] == "hot layers of Model on eager, batch 2: 80 % of 10 ms"
    assert "encoder.layer.*.dense ×2, 64 × 384 → 1536 8 80.0 50" in shown
    assert "Lissom packed_linear, avx2, float32" in shown
    assert repr(found) == "<LayerTimes of Model on eager, batch 2: 3 rows; print it to read the hot ones>"


def test_without_ceilings_the_table_says_how_to_get_them():
    shown = " ".join(str(LayerTimes("Model", (layer(8.0, None), layer(1.0, None)))).split())
    assert "encoder.layer.*.dense ×2, 64 × 384 → 1536 8 88.9 Lissom" in shown
    assert "Run `lissom machine` once to see shares of the roofline." in shown
    assert "% of roof" not in shown


def test_equal_layers_are_added_up():
    case = tiny_bert()
    program = captures.compile(case.model, case.inputs, checks="off").program
    tensors = program.signature.flatten(case.args, case.kwargs)
    found = layer_times(program, tensors, dict.fromkeys(program.nodes(), 0.5), MACHINE, backend="eager")
    batch, tokens = tensors[0].shape
    assert found.title.startswith("BertModel on eager, ")
    assert sum(item.count for item in found.layers) == len(program.nodes())
    assert found.whole_ms == pytest.approx(0.5 * len(program.nodes()))
    width, hidden = case.model.config.hidden_size, case.model.config.intermediate_size
    (up,) = (item for item in found.layers if item.pattern == "encoder.layer.*.intermediate.dense")
    assert (up.count, up.shape) == (case.model.config.num_hidden_layers, f"{batch * tokens} × {width} → {hidden}")
    seconds = sum(node_seconds(node, item, MACHINE) for node, item in costs_on(program, tensors)[1].items())
    assert sum(item.roof_ms or 0.0 for item in found.layers) == pytest.approx(1e3 * seconds)
