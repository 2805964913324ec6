"""How bfloat16 is multiplied: in float32, or by the processor's own instruction where it is faster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lissom.compiler.verify.divergence import relative_error
from lissom.ops.native import load_kernels, self_test
from lissom.ops.packed_linear import pack

MISSING = load_kernels()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def ways() -> Iterator[list[bool]]:
    """The settings of this processor, False first; the one it had returns at the end."""
    before = torch.ops.lissom.dots_bfloat16()
    yield sorted({torch.ops.lissom.dots_bfloat16(wanted) for wanted in (False, True)})
    torch.ops.lissom.dots_bfloat16(before)


def call(name: str, wide: bool, operands: tuple[torch.Tensor | None, ...], options: dict) -> torch.Tensor:
    """A kernel's result in float32; wide: for float32 operands of the same values."""
    if wide:
        operands = tuple(item if item is None or item.dtype != torch.bfloat16 else item.float() for item in operands)
    return getattr(torch.ops.lissom, name)(*operands, **options).float()


@torch.inference_mode()
def test_every_kernel_gives_the_same_either_way(ways: list[bool]) -> None:
    for name, _, operands, options in self_test.cases(torch.bfloat16):
        found = []
        for dots in ways:
            torch.ops.lissom.dots_bfloat16(dots)
            found.append(call(name, False, operands, dict(options)))
        # Attention by the instruction rounds its weights to 8 bits, and each result is rounded once more.
        assert relative_error(found[0], found[-1]) < 1e-2, name


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 5, 30, 113])
def test_products_in_float32_are_rounded_once(ways: list[bool], rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(count, 70, generator=generator).bfloat16() for count in (rows, 45))
    torch.ops.lissom.dots_bfloat16(False)
    options = {"features": 45, "activation": "none", "combine": "add"}
    found = torch.ops.lissom.packed_linear(x, pack(weight), None, None, **options)
    wanted = torch.ops.lissom.packed_linear(x.float(), pack(weight.float()), None, None, **options)
    # The same sums in the same order but for contraction to fused multiply-adds: a few may round the other way.
    assert (found == wanted.bfloat16()).float().mean() > 0.99


@torch.inference_mode()
def test_rounding_is_that_of_pytorch(ways: list[bool]) -> None:
    """Stores are emulated where the processor cannot round to bfloat16: ties, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    large, small = torch.randn(2, 300, generator=generator) * torch.tensor([[1.0], [2.0**-8]])
    ends = [
        (1, 2**-8),
        (1 + 2**-7, 2**-8),
        (-1, -(2**-8)),
        (torch.inf, 1),
        (-torch.inf, 1),
        (torch.nan, 1),
        (3.38e38, 2e36),
        (0, 0),
    ]
    terms = torch.cat([torch.stack([large, small], 1), torch.tensor(ends)]).bfloat16()
    torch.ops.lissom.dots_bfloat16(False)
    x, options = torch.ones(1, 2, dtype=torch.bfloat16), {"features": len(terms), "activation": "none", "combine": "add"}
    found = torch.ops.lissom.packed_linear(x, pack(terms), None, None, **options)
    torch.testing.assert_close(found, terms.float().sum(1).bfloat16()[None], rtol=0, atol=0, equal_nan=True)
