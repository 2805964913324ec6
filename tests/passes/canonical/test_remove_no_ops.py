from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lissom
from lissom.backends.base import Backend
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.passes.canonical.remove_no_ops import RemoveNoOps
from tests.support import captures
from tests.support.harness import (
    Calls,
    TextCase,
    aten,
    calls,
    capture_model,
    check_golden,
    every_backend,
    rewrite,
    text_cases,
)
from tests.support.models import normal, seeded

Function = Callable[..., object]


COPIES_FOR_THE_CALLER: dict[str, Function] = {
    "clone": lambda x: x.clone(),
    "clone of a view": lambda x: x.transpose(1, 2).clone(),
    "view of a clone": lambda x: x.clone().reshape(-1, 8),
    "dropout of a clone": lambda x: F.dropout(x.clone(), 0.5, training=False),
    "cast that copies": lambda x: x.to(torch.float32, copy=True),
    "sum with zero": lambda x: x + 0,
    "product with one": lambda x: x * 1,
    "single repeat": lambda x: x.repeat(1, 1, 1),
    "concatenation of one": lambda x: torch.cat([x], 1),
    "split in one": lambda x: (x * 1).split(8, 2)[0],
}


class Copying(nn.Module):
    """Heads split off the usual way: dropout, a view, a transpose, a cast, a copy, a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.dropout(self.linear(x)).view(batch, length, 2, 4).transpose(1, 2).to(x.dtype)
        return heads.contiguous().view(batch, 2, length * 4)


class Cache(nn.Module):
    """Keeps a sum of what it saw and gives back what it was before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.total.view(1, 8).clone()
        self.total.add_(x.sum((0, 1)))
        return before


def test_rewrites() -> None:
    _, history = rewrite(RemoveNoOps(), seeded(Copying), normal(2, 5, 8))
    check_golden("remove_no_ops", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    program, history = rewrite(RemoveNoOps(), nn.Sequential(nn.Linear(8, 8), nn.GELU()), normal(2, 5, 8))
    assert program.text() == history.texts[0]
    assert history.steps[1].summary == "nothing to do"


def test_keeps_dropout_in_training() -> None:
    found = capture_model(seeded(Copying), normal(2, 5, 8))
    dropout = found.program.nodes(aten.dropout.default)[0]
    Editor(found.program, "test").change_call(dropout, aten.dropout.default, dropout.args[0], 0.5, True)
    # Structural checks: two runs with random numbers cannot be compared.
    program, _ = Pipeline([RemoveNoOps()], checks="structural").run(found.program)
    assert calls(program, aten.dropout.default) == 1


@pytest.mark.parametrize("copy", COPIES_FOR_THE_CALLER.values(), ids=COPIES_FOR_THE_CALLER)
def test_the_callers_tensor_is_not_handed_out(copy: Function) -> None:
    program, _ = rewrite(RemoveNoOps(), Calls(copy), normal(2, 5, 8))
    x = normal(2, 5, 8)
    program(x).zero_()
    assert torch.equal(x, normal(2, 5, 8))


def test_a_weight_is_not_handed_out() -> None:
    program, _ = rewrite(RemoveNoOps(), Calls(lambda model, x: (x * 2, model.table + 0), table=torch.ones(3)), normal(2, 5, 8))
    program(normal(2, 5, 8))[1].zero_()
    assert torch.equal(program.weight("table"), torch.ones(3))


def test_copy_of_state_keeps_what_it_was_before_write() -> None:
    program, _ = rewrite(RemoveNoOps(), Cache(), normal(2, 5, 8))
    assert calls(program, aten.clone.default) == 1
    assert torch.equal(program(normal(2, 5, 8)), torch.zeros(1, 8))


def test_assignment_becomes_its_value_with_target_size_and_dtype() -> None:
    """`copy`, which export makes of it, has no gradient: nothing behind it could be trained."""

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[...] = x.mean(1, keepdim=True).double()
        y[:, 1:] = x[:, :-1].sin()
        return y * x

    x = normal(2, 5, 8)
    program, _ = rewrite(RemoveNoOps(), Calls(function), x)
    assert calls(program, aten.copy.default) == 0
    torch.testing.assert_close(program(x), function(x), rtol=0, atol=0)


def test_a_constant_made_in_forward_is_read_directly() -> None:
    program, _ = rewrite(RemoveNoOps(), Calls(lambda x: x * torch.tensor(2.0)), normal(2, 5, 8))
    assert [node.target for node in program.nodes()] == [aten.mul.Tensor]


@pytest.mark.parametrize("shape", [(2, 5, 8), (1, 1, 8), (3, 11, 8)], ids=str)
def test_numbers(shape: tuple[int, ...]) -> None:
    module = seeded(Copying)
    program, _ = rewrite(RemoveNoOps(), module, normal(2, 5, 8))
    x = normal(*shape, seed=1)
    heads = F.linear(x, module.linear.weight, module.linear.bias).unflatten(2, (2, 4)).permute(0, 2, 1, 3)
    # One linear layer is all that computes; the same kernel on the same values gives the same bits.
    assert torch.equal(program(x), heads.flatten(2))


@text_cases("remove_no_ops")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(Copying)
    fast = captures.compile(module, normal(2, 5, 8), passes=[RemoveNoOps()], backend=backend)
    x = normal(3, 7, 8, seed=1)
    # One layer of eight inputs, whose products each backend sums in its own order.
    torch.testing.assert_close(fast(x), module(x), rtol=0, atol=1e-6)


def test_twice_is_once() -> None:
    program, history = rewrite("remove-no-ops,remove-no-ops", seeded(Copying), normal(2, 5, 8))
    assert program.text() == history.texts[1]
    assert history.steps[2].summary == "nothing to do"


def twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    return y, y.clone(), y + 0, x.sin(), x.sin()


def test_outputs_of_equal_value_keep_memory_of_their_own() -> None:
    found = lissom.optimize(Calls(twice), normal(2, 3)).program(normal(2, 3, seed=1))
    assert len({item.untyped_storage().data_ptr() for item in found}) == len(found)
    for one, other in zip(found, twice(normal(2, 3, seed=1)), strict=True):
        assert torch.equal(one, other)
