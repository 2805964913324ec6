"""Tests of lissom.compiler.calibration.observers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.calibration import observers
from lissom.compiler.calibration.observers import Observer, choose_range, observed_ranges, weight_scale
from lissom.ops import formats
from lissom.ops.formats import FORMATS
from tests.support import captures
from tests.support.models import normal

FORM = FORMATS["uint8"]


def histogram(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = values.aminmax()
    return torch.histc(values, 2048, float(low), float(high)).double(), low, high


def outliers() -> torch.Tensor:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[0] = 40.0
    return values


def squared_error(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> float:
    scale, zero_point = formats.scale_for(low, high, FORM)
    found = formats.dequantize(formats.quantize(values, scale, zero_point, FORM), scale, zero_point, torch.float32)
    return float((found - values).square().mean())


def test_min_max_keeps_everything() -> None:
    counts, low, high = histogram(outliers())
    assert choose_range(counts, low, high, "min-max", FORM) == (low, high)


def test_a_percentile_cuts_the_outlier_and_little_more() -> None:
    values = outliers()
    low, high = choose_range(*histogram(values), "percentile", FORM, 0.999)
    inside = ((values >= low) & (values <= high)).double().mean()
    assert 0.9985 <= float(inside) <= 0.9999
    assert float(high) < 5


@pytest.mark.parametrize("observer", ["mse", "entropy"])
def test_an_outlier_is_cut_off_where_that_costs_less(observer: Observer) -> None:
    counts, low, high = histogram(outliers())
    found = choose_range(counts, low, high, observer, FORMATS["uint4"])
    assert float(found[1]) < 0.5 * float(high)


def test_mse_is_the_best_of_the_factors() -> None:
    values = outliers()
    counts, low, high = histogram(values)
    found = squared_error(values, *choose_range(counts, low, high, "mse", FORM))
    best = min(squared_error(values, factor * low, factor * high) for factor in torch.linspace(1, 0.2, 81))
    assert found <= best * 1.05


@pytest.mark.parametrize("observer", ["min-max", "percentile", "mse", "entropy"])
def test_constants_and_nothing_have_a_range(observer: Observer) -> None:
    zero = torch.tensor(0.0)
    assert choose_range(torch.zeros(2048).double(), zero, zero, observer, FORM) == (zero, zero)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("observer", ["percentile", "mse", "entropy"])
def test_values_far_from_zero_keep_their_range(observer: Observer, sign: int) -> None:
    counts, low, high = histogram(sign * (10 + torch.rand(1000, generator=torch.Generator().manual_seed(0))))
    found = choose_range(counts, low, high, observer, FORM)
    # The narrower ranges go down to a fifth, and the values lie between ten and eleven.
    assert float(max(abs(end) for end in found)) > 10


def test_ranges_are_those_of_all_samples() -> None:
    program = captures.optimize(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), torch.ones(2, 4)).program
    relu = program.nodes(torch.ops.aten.relu.default)[0]
    data = [[torch.full((2, 4), 3.0)], [torch.full((2, 4), -1.0)], [torch.full((2, 4), 7.0)]]
    low, high = observed_ranges(program, data, {relu}, "min-max", FORM)[relu]
    assert (float(low), float(high)) == (0.0, 7.0)
    low, high = observed_ranges(program, data, {relu}, "mse", FORM)[relu]
    assert float(high) == pytest.approx(7.0)


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_squared_error_weight_scales_lose_less_per_block(name: str) -> None:
    form = FORMATS[name]
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) ** 3

    def errors(observer: str) -> torch.Tensor:
        scale, zero_point = weight_scale(weight, (6, 2), form, observer)  # pyright: ignore[reportArgumentType]
        found = formats.dequantize(formats.quantize(weight, scale, zero_point, form), scale, zero_point, torch.float32)
        return (found - weight).square().view(6, 2, 32).sum(-1)

    plain, best = errors("min-max"), errors("mse")
    assert bool((best <= plain * 1.0001).all())
    assert float(best.sum()) < 0.99 * float(plain.sum())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_largest_value_of_block_gets_level_without_counterpart(sign: float) -> None:
    """Eight equal steps, of which int4 has eight on one side of zero only."""
    weight = sign * torch.arange(9.0)[None]
    scale, _ = weight_scale(weight, (1, 1), FORMATS["int4"], "mse")
    found = formats.dequantize(formats.quantize(weight, scale, None, FORMATS["int4"]), scale, None, torch.float32)
    assert float((found - weight).abs().max()) < 0.1
    assert float(weight_scale(weight, (1, 1), FORMATS["int8"], "mse")[0]) > 0


@pytest.mark.parametrize(("form", "observer"), [("int4", "mse"), ("uint4", "mse"), ("int8", "min-max"), ("fp8", "min-max")])
def test_auto_searches_where_levels_are_few(form: str, observer: str) -> None:
    weight = normal(8, 32)
    for found, wanted in zip(
        weight_scale(weight, (8, 2), FORMATS[form], "auto"),
        weight_scale(weight, (8, 2), FORMATS[form], observer),  # pyright: ignore[reportArgumentType]
        strict=True,
    ):
        assert (found is None and wanted is None) or torch.equal(found, wanted)


@pytest.mark.parametrize("form", ["int4", "uint4"])
@pytest.mark.parametrize("shape", [(30, 2), (15, 2), (30, 1), (3, 8)])
def test_a_large_weight_has_the_scales_of_its_rows(monkeypatch: pytest.MonkeyPatch, form: str, shape: tuple[int, int]) -> None:
    """It is searched in pieces; the oracle gives each block of rows alone."""
    weight = normal(30, 8)
    rows = 30 // shape[0]
    alone = [weight_scale(block, (1, shape[1]), FORMATS[form], "mse") for block in weight.split(rows)]
    monkeypatch.setattr(observers, "_AT_ONCE", 100)
    scale, zero_point = weight_scale(weight, shape, FORMATS[form], "mse")
    assert torch.equal(scale, torch.cat([item for item, _ in alone]))
    if zero_point is not None:
        assert torch.equal(zero_point, torch.cat([item for _, item in alone if item is not None]))
