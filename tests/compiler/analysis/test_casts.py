"""Tests of lissom.compiler.analysis.casts."""

from __future__ import annotations

import itertools

import pytest
import torch

from lissom.compiler.analysis.casts import cast_from, dtype_of, holds, rests_on_copy
from tests.support.harness import Calls, aten, capture_model
from tests.support.models import captured, normal

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """All values of a short dtype, the extremes and random ones of a long one."""
    if dtype is torch.bool:
        return torch.tensor([False, True])
    if dtype.itemsize <= 2:
        bits = torch.arange(-(2**15), 2**15).to(torch.int16)
        return bits.view(dtype) if dtype.itemsize == 2 else torch.arange(256).to(torch.uint8).view(dtype)
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        return torch.cat([normal(99).to(dtype) * 1e3, torch.tensor([limits.max, limits.tiny, -0.0, 1 / 3], dtype=dtype)])
    limits = torch.iinfo(dtype)
    return torch.tensor([limits.min, limits.max, limits.max - 1, 2**24 + 1, 0], dtype=dtype)


@pytest.mark.parametrize(("wide", "narrow"), [*itertools.product((*FLOATS, *INTEGERS), repeat=2)])
def test_a_dtype_that_holds_another_gives_its_values_again(wide: torch.dtype, narrow: torch.dtype) -> None:
    if wide is narrow:
        assert not holds(wide, narrow)
        return
    value = values_of(narrow)
    value = value[~value.isnan()] if narrow.is_floating_point else value
    again = torch.equal(value.to(wide).to(narrow), value)
    assert again or not holds(wide, narrow)
    # Of dtypes that are not listed, integers may survive by wrapping around, and complex ones are left out.
    if again and narrow.is_floating_point:
        assert holds(wide, narrow)


@pytest.mark.parametrize(
    ("narrow", "other"), [*itertools.product((torch.float16, torch.bfloat16, torch.int16, torch.uint8), FLOATS)]
)
def test_two_casts_are_one_where_the_first_loses_nothing(narrow: torch.dtype, other: torch.dtype) -> None:
    value = values_of(narrow)
    for wide in (item for item in FLOATS if holds(item, narrow)):
        torch.testing.assert_close(value.to(wide).to(other), value.to(other), rtol=0, atol=0, equal_nan=True)


def test_plain_casts_are_told_from_others() -> None:
    function = lambda x: (x.to(torch.bfloat16).sin(), x.to(torch.float32).cos(), x.to(torch.float64, copy=True).exp())  # noqa: E731
    program = capture_model(Calls(function), normal(2, 3)).program
    casts = program.nodes(aten.to.dtype, aten._to_copy.default)
    assert len(casts) == 3
    plain = [node for node in program if cast_from(node) is not None]
    assert [dtype_of(node) for node in plain] == [torch.bfloat16]
    assert cast_from(plain[0]) is program.placeholders[0]
    assert cast_from("x") is None


def test_state_and_what_is_handed_out_rest_on_copies() -> None:
    program = captured("counter")
    read = next(node for node in program if node.op == "get_attr" and node.target == "seen")
    reason = rests_on_copy(program, program.nodes()[0], read)
    assert reason == "it keeps the value of the state before a write"
    handed = capture_model(Calls(lambda x: x.to(torch.float64)), normal(2, 3)).program
    cast = handed.nodes(aten.to.dtype)[0]
    assert rests_on_copy(handed, cast, handed.placeholders[0]) == "the caller would be given an input or a weight itself"
    viewed = capture_model(Calls(lambda x: x.exp().double().view(torch.int64).sum()), normal(2, 3)).program
    cast = viewed.nodes(aten.to.dtype)[0]
    assert rests_on_copy(viewed, cast, viewed.nodes(aten.exp.default)[0]) == "an operator reads its memory layout"
    free = capture_model(Calls(lambda x: x.exp().double().sin()), normal(2, 3)).program
    assert rests_on_copy(free, free.nodes(aten.to.dtype)[0], free.nodes(aten.exp.default)[0]) is None
