"""Maps of dimensions, by hand; `analysis/test_token_positions.py` tests that positions follow them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from lissom.compiler.ir.dimension_map import dimension_map, places, product_of
from tests.support.harness import Calls, aten, capture_model
from tests.support.models import normal

MAPS: dict[str, tuple[Callable[[torch.Tensor], object], object, tuple[int | None, ...]]] = {
    "permute": (lambda x: x.permute(2, 0, -2), aten.permute.default, (2, 0, 1)),
    "transpose": (lambda x: x.transpose(0, -1), aten.transpose.int, (2, 1, 0)),
    "the last two": (lambda x: x.mT, aten.mT.default, (0, 2, 1)),
    "unsqueeze": (lambda x: x.unsqueeze(-2), aten.unsqueeze.default, (0, 1, None, 2)),
    "squeeze": (lambda x: x.squeeze(), aten.squeeze.default, (0, 2)),
    "squeeze of more than one": (lambda x: x.squeeze(0), aten.squeeze.dim, (0, 1, 2)),
    "select": (lambda x: x[:, 0], aten.select.int, (0, 2)),
    "unbind": (lambda x: x.unbind(-1)[0], aten.unbind.int, (0, 1)),
    "expand": (lambda x: x.expand(5, 2, 4, 6), aten.expand.default, (None, 0, None, 2)),
    "repeat": (lambda x: x.repeat(1, 3, 1), aten.repeat.default, (0, None, 2)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2), aten.repeat_interleave.self_int, (None,)),
    "slice": (lambda x: x[..., 1:], aten.slice.Tensor, (0, 1, None)),
    "merge": (lambda x: x.reshape(2, 6), aten.reshape.default, (0, 2)),
    "split off": (lambda x: x.unflatten(-1, (2, 3)), aten.unflatten.int, (0, 1, None, None)),
    "mixed": (lambda x: x.reshape(3, 4), aten.reshape.default, (None, None)),
    "split": (lambda x: x.split(2, -1)[0], aten.split.Tensor, (0, 1, None)),
    "cat": (lambda x: torch.cat([x, x], 1), aten.cat.default, (0, None, 2)),
    "stack": (lambda x: torch.stack([x, x], 1), aten.stack.default, (0, None, 1, 2)),
    "pad": (lambda x: functional.pad(x, (0, 0, 1, 0)), aten.pad.default, (0, None, 2)),
    "mean": (lambda x: x.mean(1), aten.mean.dim, (0, 2)),
    "mean, kept": (lambda x: x.mean((0, 2), keepdim=True), aten.mean.dim, (None, 1, None)),
    "softmax": (lambda x: x.softmax(-1), aten.softmax.int, (0, 1, None)),
    "cast": (lambda x: x.to(torch.float64), aten.to.dtype, (0, 1, 2)),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_dimension_is_found_where_it_goes(name: str) -> None:
    function, target, wanted = MAPS[name]
    program = capture_model(Calls(function), normal(2, 1, 6), dynamic=False).program
    (node,) = program.nodes(target)
    assert dimension_map(node) == wanted
    assert places(node) == {source: dim for dim, source in enumerate(wanted) if source is not None}


def test_an_operator_that_computes_has_no_map() -> None:
    program = capture_model(Calls(lambda x: x @ x.mT), normal(2, 3, 6), dynamic=False).program
    (node,) = program.nodes(aten.matmul.default)
    assert dimension_map(node) is None
    assert places(node) is None


def test_dimensions_of_varying_sizes_are_told_from_each_other() -> None:
    program = capture_model(Calls(lambda x: x.reshape(x.shape[0] * x.shape[1], 2, 3)), normal(4, 5, 6)).program
    (node,) = program.nodes(aten.reshape.default)
    assert dimension_map(node) == (None, None, None)


def test_products_of_sizes_are_compared_expanded() -> None:
    import sympy

    tokens = sympy.Symbol("tokens")
    assert product_of([2, tokens + 1]) == product_of([1, 2 * tokens + 2])
    assert product_of([2, 3]) == 6
