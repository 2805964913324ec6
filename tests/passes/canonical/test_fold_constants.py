from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.ops.quantization import fake_quantize
from lissom.passes.canonical.fold_constants import FoldConstants
from tests.support import captures
from tests.support.harness import (
    Calls,
    TextCase,
    aten,
    check_golden,
    every_backend,
    every_backend_but_onnxruntime_slow,
    rewrite,
    text_cases,
)
from tests.support.models import normal, seeded
from tests.support.written_attention import tiny_deberta

Function = Callable[..., object]


class GemmaNorm(nn.Module):
    """Gemma's norm: the stored weight is how far the scale is from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, [8]) * (1.0 + self.weight.float())


class PositionBias(nn.Module):
    """Alibi-like slopes times distances, for eight positions."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(8)
        slopes = 2.0 ** -torch.arange(1, 5)
        return x + slopes[:, None, None] * -(positions[:, None] - positions[None, :]).abs()


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(normal(*shape))


def test_rewrites() -> None:
    _, history = rewrite(FoldConstants(), seeded(GemmaNorm), normal(2, 5, 8))
    check_golden("fold_constants", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    program, history = rewrite(FoldConstants(), seeded(lambda: nn.Linear(8, 8)), normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (3, 11, 8)], ids=str)
def test_numbers(shape: tuple[int, ...]) -> None:
    module = seeded(GemmaNorm)
    program, _ = rewrite(FoldConstants(), module, normal(2, 5, 8))
    x = normal(*shape, seed=1)
    wide = x.double()
    wanted = wide / (wide.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    wanted = wanted * (1 + module.weight.double())
    # Norm and product round a handful of times to 6e-8 relative, on values below 10.
    torch.testing.assert_close(program(x).double(), wanted, rtol=1e-6, atol=1e-6)


def test_a_table_of_position_biases_becomes_one_constant() -> None:
    program, _ = rewrite(FoldConstants(), PositionBias(), normal(2, 4, 8, 8))
    wanted = torch.tensor([[[-abs(i - j) * math.pow(2, -h) for j in range(8)] for i in range(8)] for h in range(1, 5)])
    assert [node.target for node in program.nodes()] == [aten.add.Tensor]
    # Powers of two times small integers: exact.
    assert torch.equal(next(iter(program.weights().values())), wanted)


def test_a_cast_of_a_weight_is_folded() -> None:
    half = nn.Parameter(normal(8).half())
    program, _ = rewrite(FoldConstants(), Calls(lambda model, x: x * model.w.float(), w=half), normal(2, 5, 8))
    # Not `folded.to`: that name belongs to every module.
    assert torch.equal(program.weight("folded.to_1"), half.float())


def test_random_numbers_stay() -> None:
    # Times zero, so that two runs agree.
    program, history = rewrite(FoldConstants(), Calls(lambda x: x + torch.rand(8) * 0), normal(2, 5, 8))
    assert program.text() == history.texts[0]


def test_what_the_caller_is_given_stays() -> None:
    module = Calls(lambda model, x: (x * 2, model.w * 2), w=torch.ones(3))
    program, _ = rewrite(FoldConstants(), module, normal(2, 5, 8))
    program(normal(2, 5, 8))[1].zero_()
    assert torch.equal(program(normal(2, 5, 8))[1], torch.full((3,), 2.0))


def test_trainable_stays_trainable() -> None:
    program = rewrite(FoldConstants(), seeded(GemmaNorm), normal(2, 5, 8))[0].own_copy()
    folded = program.weight("folded.add")
    program(normal(2, 5, 8)).sum().backward()
    assert isinstance(folded, nn.Parameter)
    assert folded.grad.shape == (8,)


def test_a_buffer_stays_a_buffer() -> None:
    program, _ = rewrite(FoldConstants(), Calls(lambda model, x: x * (model.w + 1), w=torch.ones(8)), normal(2, 5, 8))
    assert not isinstance(program.weight("folded.add"), nn.Parameter)


def test_frozen_stays_frozen() -> None:
    frozen = nn.Parameter(torch.ones(8), requires_grad=False)
    program, _ = rewrite(FoldConstants(), Calls(lambda model, x: x * (model.w + 1), w=frozen), normal(2, 5, 8))
    assert not program.own_copy().weight("folded.add").requires_grad


def test_the_users_module_is_untouched() -> None:
    module = seeded(GemmaNorm)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    rewrite(FoldConstants(), module, normal(2, 5, 8))
    assert list(module.state_dict()) == list(before)
    assert torch.equal(module.weight, before["weight"])
    assert not hasattr(module, "folded")


@text_cases("fold_constants")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(GemmaNorm)
    fast = captures.compile(module, normal(2, 5, 8), passes="fold-constants,raise-rms-norm", backend=backend)
    x = normal(3, 7, 8, seed=1)
    # One product the other way round: a rounding of 6e-8 on values below 10.
    torch.testing.assert_close(fast(x), module(x), rtol=1e-6, atol=1e-6)


@every_backend_but_onnxruntime_slow
def test_lossy_pass_changes_both_products_of_shared_matrix(backend: Backend) -> None:
    case = tiny_deberta()
    sparse = copy.deepcopy(case.model)
    changed = captures.optimize(case.model, case.inputs, passes="sparsify{keep=0.5}").program.weights()
    sparse.load_state_dict({name: weight for name, weight in changed.items() if name in sparse.state_dict()}, strict=False)
    fast = captures.compile(case.model, case.inputs, passes="sparsify{keep=0.5}", backend=backend)
    with torch.no_grad():
        wanted = sparse(**case.inputs).last_hidden_state
    # One layer of float32: sums of 24 terms, unit roundoff 6e-8, on values below 10.
    torch.testing.assert_close(fast(**case.inputs).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


def test_quantized_weights_stay_quantized() -> None:
    """Passes that canonicalize again may follow quantize."""
    layers = seeded(lambda: nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)))
    found = captures.optimize(layers, normal(4, 16), passes="quantize{scheme=int8-dynamic},fold-constants")
    assert len(found.program.nodes(fake_quantize)) == 1  # the last layer is a head
    assert not any(name.startswith("folded.") for name in found.program.weights())
