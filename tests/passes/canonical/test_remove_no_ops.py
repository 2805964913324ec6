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
from tests import captures
from tests.models import normal, seeded
from tests.passes.harness import Calls, apply, aten, calls, capture_model, check_golden, every_backend, rewrite

Function = Callable[..., object]

NO_OPS: dict[str, Function] = {
    "dropout outside training": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "feature dropout": lambda x: F.dropout1d(x, 0.5, training=False),
    "alpha dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "alias": lambda x: aten.alias(x),
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "cast to its dtype": lambda x: x.to(torch.float32),
    "cast to its dtype, copied": lambda x: x.to(torch.float32, copy=True),
    "cast to its device": lambda x: x.to("cpu"),
    "cast to its own type": lambda x: x.type_as(x),
    "cast to the type of another": lambda x: x.to(torch.zeros(1)),
    "expand to its sizes": lambda x: x.expand(-1, -1, 8),
    "expand as itself": lambda x: x.expand_as(x),
    "reshape to its sizes": lambda x: x.reshape(x.shape),
    "view of its sizes": lambda x: x.view(x.shape[0], x.shape[1], 8),
    "flatten of one dimension": lambda x: x.flatten(2),
    "repeat once": lambda x: x.repeat(1, 1, 1),
    "squeeze of a wide dimension": lambda x: x.squeeze(2),
    "slice of everything": lambda x: x[:, 0:],
    "slice to its size": lambda x: x[..., :8],
    "add zero": lambda x: x + 0,
    "add a zero of another kind": lambda x: x + 0.0,
    "subtract zero": lambda x: x - 0,
    "multiply by one": lambda x: 1 * x,
    "divide by one": lambda x: x / 1.0,
    "power of one": lambda x: x.pow(1),
}

NEAR_MISSES: dict[str, Function] = {
    "cast to another dtype": lambda x: x.to(torch.float64),
    "slice that cuts": lambda x: x[..., :7],
    "slice with a step": lambda x: x[..., ::2],
    "expand that broadcasts": lambda x: x[..., :1].expand(-1, -1, 8),
    "repeat twice": lambda x: x.repeat(1, 1, 2),
    "reshape to other sizes": lambda x: x.reshape(x.shape[0], -1),
    "squeeze of a single dimension": lambda x: x[..., :1].squeeze(2),
    "add one": lambda x: x + 1,
    "subtract from zero": lambda x: 0 - x,
    "divide by one, rounded": lambda x: x.div(1, rounding_mode="floor"),
    "power of two": lambda x: x.pow(2),
}

INTEGER_NEAR_MISSES: dict[str, Function] = {
    "add a floating zero": lambda x: x + 0.0,
    "multiply by a floating one": lambda x: x * 1.0,
    "divide by one": lambda x: x / 1,
    "add zero to flags": lambda x: (x > 0) + 0,
}

COPIES_FOR_THE_CALLER: dict[str, Function] = {
    "clone": lambda x: x.clone(),
    "clone of a view": lambda x: x.transpose(1, 2).clone(),
    "view of a clone": lambda x: x.clone().reshape(-1, 8),
    "dropout of a clone": lambda x: F.dropout(x.clone(), 0.5, training=False),
    "cast that copies": lambda x: x.to(torch.float32, copy=True),
    "sum with zero": lambda x: x + 0,
    "product with one": lambda x: x * 1,
    "single repeat": lambda x: x.repeat(1, 1, 1),
}

LAYOUT_READERS: dict[str, Function] = {
    "as_strided": lambda x: x.transpose(1, 2).contiguous().as_strided((8, 5), (5, 1)) * 2,
    "view_as_complex": lambda x: torch.view_as_complex(x.reshape(2, 5, 2, 4).transpose(2, 3).contiguous()).abs(),
    "view of another dtype": lambda x: x.transpose(1, 2).contiguous().view(torch.int32) + 1,
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


@pytest.mark.parametrize("no_op", NO_OPS.values(), ids=NO_OPS)
def test_removes(no_op: Function) -> None:
    program, _ = rewrite(RemoveNoOps(), Calls(lambda x: no_op(x * 2).sin()), normal(2, 5, 8))
    assert [node.target for node in program.nodes()] == [aten.mul.Tensor, aten.sin.default]


@pytest.mark.parametrize("near_miss", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_keeps(near_miss: Function) -> None:
    found = capture_model(Calls(lambda x: near_miss(x * 2).sin()), normal(2, 5, 8))
    before = [node.target for node in found.program.nodes() if node.target is not aten._assert_tensor_metadata.default]
    program, _ = apply(RemoveNoOps(), found.program, found.example)
    assert [node.target for node in program.nodes()] == before


@pytest.mark.parametrize("near_miss", INTEGER_NEAR_MISSES.values(), ids=INTEGER_NEAR_MISSES)
def test_keeps_what_changes_the_dtype_of_integers(near_miss: Function) -> None:
    program, history = rewrite(RemoveNoOps(), Calls(near_miss), torch.arange(10).reshape(2, 5))
    assert program.text() == history.texts[0]


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


def test_a_copy_of_state_keeps_what_it_was_before_the_write() -> None:
    program, _ = rewrite(RemoveNoOps(), Cache(), normal(2, 5, 8))
    assert calls(program, aten.clone.default) == 1
    assert torch.equal(program(normal(2, 5, 8)), torch.zeros(1, 8))


@pytest.mark.parametrize("reader", LAYOUT_READERS.values(), ids=LAYOUT_READERS)
def test_keeps_a_copy_whose_layout_is_read(reader: Function) -> None:
    program, _ = rewrite(RemoveNoOps(), Calls(reader), normal(2, 5, 8))
    assert calls(program, aten.contiguous.default) == 1


def test_a_view_of_a_removed_copy_becomes_a_reshape() -> None:
    module = Calls(lambda x: x.transpose(1, 2).contiguous().view(16, 5).sin())
    program, _ = rewrite(RemoveNoOps(), module, normal(2, 5, 8), dynamic=False)
    assert [node.target for node in program.nodes()] == [aten.transpose.int, aten.reshape.default, aten.sin.default]


def test_a_cast_to_the_type_of_another_names_the_dtype() -> None:
    program, _ = rewrite(RemoveNoOps(), Calls(lambda x, y: x.type_as(y) * 2), normal(2, 5, 8), normal(2, 5, 8).bfloat16())
    assert [node.target for node in program.nodes()] == [aten.to.dtype, aten.mul.Tensor]


def test_an_assignment_becomes_what_is_assigned_in_the_sizes_and_dtype_of_its_place() -> None:
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
