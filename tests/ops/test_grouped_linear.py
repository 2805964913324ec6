"""`lissom::quantized_linear_grouped` and `lissom::weight_quantized_linear_grouped`, against one layer per group."""

from __future__ import annotations

import pytest
import torch

from lissom.ops import (
    quantized_linear,
    quantized_linear_grouped,
    weight_quantized_linear,
    weight_quantized_linear_grouped,
)
from lissom.ops.quantized_linear import fill_panels, pack_bytes, pack_groups, quantized_linear_grouped_reference
from lissom.ops.weight_quantized_linear import pack_blocks, pack_stored, weight_quantized_linear_grouped_reference
from tests.support.models import normal

FEATURES, INPUTS, ROWS = 45, 64, 11
ENDS = {
    "every group": [2, 3, 11],
    "an empty first group": [0, 4, 11],
    "empty groups": [0, 11, 11],
    "rows after the last group": [1, 1, 6],
    "no rows": [0, 0, 0],
}


def whole(low: int, high: int) -> torch.Tensor:
    return torch.randint(low, high, (3, FEATURES, INPUTS), generator=torch.Generator().manual_seed(3))


def scales(groups: int) -> torch.Tensor:
    return torch.rand(3, FEATURES, groups, generator=torch.Generator().manual_seed(4)) / 1000


def stacked(parts: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    return [torch.stack(items) for items in zip(*parts, strict=True)]


def weight_only(bits: int) -> list[torch.Tensor]:
    """Of uint4 with zero points, or int8."""
    q, scale = (whole(0, 16), scales(2)) if bits == 4 else (whole(-127, 128).to(torch.int8), scales(1))
    parts = [
        (pack_stored(one, "uint4" if bits == 4 else "int8"), pack_blocks(size, FEATURES))
        for one, size in zip(q, scale, strict=True)
    ]
    zeros = [(pack_blocks(torch.full((FEATURES, 2), 7, dtype=torch.uint8), FEATURES),)] * 3
    return stacked([(*part, *(zero if bits == 4 else ())) for part, zero in zip(parts, zeros, strict=True)])


def int8(by_group: bool) -> list[torch.Tensor]:
    q, scale = whole(-127, 128).to(torch.int8), scales(2 if by_group else 1)
    if by_group:
        return stacked([pack_groups(one, size, 8) for one, size in zip(q, scale, strict=True)])
    sums = q.sum(2, dtype=torch.int32)
    return stacked(
        [
            (pack_bytes(one), fill_panels(size[:, 0], FEATURES), fill_panels(total, FEATURES))
            for one, size, total in zip(q, scale, sums, strict=True)
        ]
    )


CALLS = {
    "int8 weights": (weight_quantized_linear, weight_only(8), {"format": "int8"}),
    "uint4 weights": (weight_quantized_linear, weight_only(4), {"format": "uint4"}),
    "int8": (quantized_linear, int8(by_group=False), {}),
    "int8 with groups": (quantized_linear, int8(by_group=True), {"granularity": "group"}),
}
OPERATORS = {
    weight_quantized_linear: (weight_quantized_linear_grouped, weight_quantized_linear_grouped_reference),
    quantized_linear: (quantized_linear_grouped, quantized_linear_grouped_reference),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("name", CALLS)
def test_each_group_is_a_layer_of_its_own(name: str, ends: list[int], dtype: torch.dtype) -> None:
    layer, operands, options = CALLS[name]
    x, offs = normal(ROWS, INPUTS).to(dtype), torch.tensor(ends)
    operator, reference = OPERATORS[layer]
    options = {**options, "features": FEATURES}
    found = operator(x, *operands, offs=offs, **options)
    wanted, start = torch.zeros(ROWS, FEATURES, dtype=dtype), 0
    for group, end in enumerate(ends):
        wanted[start:end] = layer(x[start:end], *(item[group] for item in operands), **options)
        start = end
    assert torch.equal(found, wanted)
    # Kernel and reference sum in another order; bfloat16 has 8 bits, and outputs are up to 3.
    allowed = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, reference(x, *operands, offs=offs, **options), rtol=0, atol=allowed)


def test_a_static_scale_is_that_of_all_groups() -> None:
    x, offs, scale = normal(ROWS, INPUTS), torch.tensor([3, 3, 11]), torch.tensor(0.05)
    zero_point = torch.tensor(120.0)
    found = quantized_linear_grouped(x, *int8(by_group=False), scale, zero_point, offs=offs, features=FEATURES)
    wanted = [
        quantized_linear(x[rows], *(item[group] for item in int8(by_group=False)), scale, zero_point, features=FEATURES)
        for group, rows in ((0, slice(3)), (2, slice(3, None)))
    ]
    assert torch.equal(found, torch.cat(wanted))


def test_a_known_scale_of_each_row_goes_along() -> None:
    x, offs = normal(ROWS, INPUTS), torch.tensor([3, 3, 11])
    scale, zero_point = torch.linspace(0.02, 0.05, ROWS)[:, None], torch.linspace(100, 130, ROWS).round()[:, None]
    found = quantized_linear_grouped(x, *int8(by_group=False), scale, zero_point, offs=offs, features=FEATURES)
    wanted = [
        quantized_linear(
            x[rows], *(item[group] for item in int8(by_group=False)), scale[rows], zero_point[rows], features=FEATURES
        )
        for group, rows in ((0, slice(3)), (2, slice(3, None)))
    ]
    assert torch.equal(found, torch.cat(wanted))


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    layer, operands, options = CALLS[name]
    given = {**options, "features": FEATURES, "offs": torch.tensor([2, 2, 11])}
    torch.library.opcheck(OPERATORS[layer][0], (normal(ROWS, INPUTS), *operands), given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offs": torch.tensor([2, 1, 11])}, "weight_quantized_linear_grouped has 11 rows, and group 1 is from row 2 to 1"),
        ({"offs": torch.tensor([2, 3, 12])}, "weight_quantized_linear_grouped has 11 rows, and group 2 is from row 3 to 12"),
        ({"offs": torch.tensor([2, 11])}, r"an operand has the sizes \[3, .*\] with 2 groups"),
        ({"offs": torch.tensor([[2, 3, 11]])}, r"offs has the sizes \[1, 3\]"),
        ({"offs": torch.tensor([2.0, 3.0, 11.0])}, "offs is of torch.float32, and must be of an integer dtype"),
        ({"features": 44, "format": "int4"}, "a packed weight"),
    ],
)
def test_operands_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    options = {"offs": torch.tensor([2, 3, 11]), "features": FEATURES, "format": "int8"}
    with pytest.raises(RuntimeError, match=message):
        weight_quantized_linear_grouped(normal(ROWS, INPUTS), *weight_only(8), **{**options, **changes})


def test_rows_of_different_groups_share_no_scale() -> None:
    with pytest.raises(RuntimeError, match="granularity is 'tensor', and must be 'token' or 'group'"):
        quantized_linear_grouped(
            normal(ROWS, INPUTS), *int8(by_group=False), offs=torch.tensor([2, 3, 11]), features=FEATURES, granularity="tensor"
        )
