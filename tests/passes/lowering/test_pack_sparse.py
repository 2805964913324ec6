"""Tests of pack-sparse; what needs tensor cores is marked `gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.eager.backend import Eager
from lissom.compiler.analysis.cost import flops
from lissom.ops import (
    block_sparse_linear,
    block_sparse_linear_norm,
    block_sparse_quantized_linear,
    block_sparse_quantized_linear_norm,
    sparse_linear,
)
from lissom.ops.block_sparse_linear import BLOCK, nonzero_blocks
from lissom.ops.epilogue import PANEL
from lissom.ops.native import load_kernels
from lissom.ops.packed_linear import pack
from lissom.passes.lowering.pack_sparse import PackSparse
from tests.ops.test_block_sparse_linear import with_zero_blocks
from tests.ops.test_sparse_linear import two_in_four
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, rewrite
from tests.support.models import normal, seeded, tiny_bert


class Two(nn.Module):
    """A layer with a 2:4 weight and a dense one."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, dtype=dtype), nn.Linear(128, 64, bias=False, dtype=dtype)
        self.up.weight.data.copy_(two_in_four(128, 64, dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def test_rewrites() -> None:
    _, history = rewrite(PackSparse(always=True), seeded(Two), normal(2, 5, 64).bfloat16())
    check_golden("pack_sparse", history.diff(0, 1))
    assert history.steps[1].summary == "rewrote 1"


def test_numbers() -> None:
    module = seeded(Two)
    program, _ = rewrite(PackSparse(always=True), module, normal(2, 5, 64).bfloat16())
    x = normal(3, 7, 64, seed=1).bfloat16()
    assert set(program.weights()) == {"up.weight_values", "up.weight_places", "up.bias", "down.weight"}
    with torch.no_grad():
        torch.testing.assert_close(program(x), module(x))


def test_leaves_other_graphs_alone() -> None:
    """Dense layers are passed over, and a layer whose weight is an embedding's too is left."""
    program, history = rewrite(PackSparse(always=True), seeded(lambda: nn.Linear(64, 64)), normal(2, 5, 64))
    assert (history.texts[0], history.steps[1].summary) == (history.texts[1], "nothing to do")
    assert calls(program, sparse_linear) == 0


@pytest.mark.parametrize(
    ("dtype", "width", "options", "reason"),
    [
        (torch.bfloat16, 64, {}, "its weight is 2:4, which makes it no faster on a CPU"),
        (torch.float32, 64, {"always": True}, "its weight is 2:4, which is fast in bfloat16 and float16 only: put cast before"),
        (torch.bfloat16, 48, {"always": True}, "its weight is 2:4, but its sizes are no multiples of 32 and 64"),
    ],
)
def test_what_cannot_be_packed_is_reported(dtype: torch.dtype, width: int, options: dict[str, bool], reason: str) -> None:
    module = nn.Linear(width, 32, dtype=dtype)
    module.weight.data.copy_(two_in_four(32, width, dtype))
    _, history = rewrite(PackSparse(**options), module, normal(2, 5, width).to(dtype))
    assert history.steps[1].summary == f"rewrote 0 of 1; skipped 1: {reason}"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_it_is_of_the_eager_backend(device: str) -> None:
    assert "pack-sparse" in [item.name() for item in Eager().lowering(torch.device(device))]


def test_composes() -> None:
    module, x = seeded(lambda: Two(torch.float32)), normal(2, 5, 64)
    found = captures.optimize(module, x, passes="sparsify{pattern=2:4},cast{dtype=bf16},pack-sparse{always=true}").program
    assert calls(found, sparse_linear) == 1
    assert calls(found, aten.linear.default) == 1


@pytest.mark.gpu
def test_it_runs_on_tensor_cores() -> None:
    module, x = seeded(Two).cuda(), normal(64, 128, 64).bfloat16().cuda()
    fast = captures.compile(module, x, passes=[PackSparse(always=True)])
    assert calls(fast.program, sparse_linear) == 1
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), module(x), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_by_default_it_is_measured() -> None:
    fast = captures.compile(seeded(Two).cuda(), normal(64, 128, 64).bfloat16().cuda())
    step = next(step for step in fast.report.history.steps if step.spelling == "pack-sparse")
    assert step.rewritten + len(step.skipped) == 1


BLOCKS = "sparsify{pattern=block,keep=0.25}"
SPARSE = (block_sparse_linear, block_sparse_quantized_linear, block_sparse_linear_norm, block_sparse_quantized_linear_norm)
LOWERING = ",fold-quantized-weights,pack-quantized-linear,pack-sparse{always=true},pack-linear,fuse-epilogues"
needs_kernels = pytest.mark.skipif(bool(load_kernels()), reason=str(load_kernels()))


@needs_kernels
@pytest.mark.parametrize(
    ("rest", "allowed"), [("", 1e-5), (",cast{dtype=bf16}", 5e-2), (",quantize{scheme=int8-dynamic}", 1e-5)]
)
def test_zero_blocks_are_left_out_on_a_cpu(rest: str, allowed: float, tmp_path: Path) -> None:
    """The products of every layer of BERT in another order; bfloat16 rounds each of some 30 steps to 8 bits."""
    case = tiny_bert()
    sparse, dense = (
        captures.compile(case.model, case.inputs, passes=BLOCKS + rest + lowering)
        for lowering in (LOWERING, LOWERING.replace("pack-sparse{always=true},", ""))
    )
    assert [calls(sparse.program, target) for target in SPARSE] == ([0, 8, 0, 4] if "int8" in rest else [8, 0, 4, 0])
    found, wanted = (run(**case.inputs).last_hidden_state for run in (sparse, dense))  # pyright: ignore
    torch.testing.assert_close(found, wanted, rtol=allowed, atol=allowed)
    sparse.save(tmp_path / "saved")
    assert torch.equal(lissom.load(tmp_path / "saved")(**case.inputs).last_hidden_state, found)  # pyright: ignore


class Wide(nn.Module):
    """Two layers large enough that skipping three quarters of the first is worth it anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 1024), nn.Linear(1024, 64)
        self.up.weight.data.copy_(with_zero_blocks(1024, 512, 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@needs_kernels
def test_what_is_measured_slower_stays_dense() -> None:
    """A layer without zeros is passed over; the other becomes sparse, or the report gives both times."""
    found = captures.compile(seeded(Wide), normal(4, 512))
    step = next(step for step in found.report.history.steps if step.spelling == "pack-sparse")
    assert step.summary == "rewrote 1" or "without zero blocks it takes" in step.summary
    assert calls(found.program, block_sparse_linear) == (step.summary == "rewrote 1")


@needs_kernels
def test_operations_of_stored_blocks_count() -> None:
    model, rows = seeded(Wide), 4
    program, _ = rewrite(PackSparse(always=True), model, normal(rows, 512))
    assert calls(program, block_sparse_linear) == 1
    stored = int(nonzero_blocks(pack(model.up.weight.detach())).sum())
    assert flops(program) == 2 * rows * (stored * BLOCK * PANEL + model.down.weight.numel())


@needs_kernels
def test_other_backends_multiply_with_the_zeros() -> None:
    pytest.importorskip("onnxruntime")
    model = seeded(Wide)
    found = captures.compile(model, normal(4, 512), backend="onnxruntime")
    assert sum(calls(found.program, target) for target in SPARSE) == 0
    # Sums of 512 products in float32.
    torch.testing.assert_close(found(normal(4, 512)), model(normal(4, 512)), rtol=1e-4, atol=1e-4)
