"""Tests of eliminate-dead on hidden."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.removal.indices import mask
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.dead_structure import eliminate, program_of, sites_of
from tests.support.harness import aten, calls, every_backend, rewrite
from tests.support.models import normal, seeded

PASS = "eliminate-dead{units=[hidden]}"


class Stream(nn.Module):
    """A stream of eight channels, two of them dead, read through a norm."""

    def __init__(self, norm: nn.Module, dead: tuple[int, ...] = (1, 6)) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8, bias=False), norm, nn.Linear(8, 4)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        with torch.no_grad():
            for weight in (self.first.weight, self.down.weight, self.down.bias, *norm.parameters()):
                if weight.shape[0] == 8:
                    weight.add_(torch.rand_like(weight))
                    weight[list(dead)] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.last(self.norm(x))


def zero_channels(program: Program, channels: list[int]) -> None:
    """Zero the channels of the stream in every weight that has it."""
    found, edit = program.fact(axes), Editor(program, "mask")
    stream = found.axis(sites_of(program).attention[0].residual, -1)
    kept = torch.ones(cast(int, stream.size), dtype=torch.bool)
    kept[channels] = False
    for node, dims in found.of.items():
        for dim, axis in enumerate(cast("tuple[Axis, ...]", dims)):
            if node.op == "get_attr" and stream in set(axis.atoms()):
                gone = (~mask(axis, {stream: kept})).nonzero().flatten()
                edit.set_weight(node, program.weight(str(node.target)).detach().index_fill(dim, gone, 0.0))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(EliminateDead(("hidden",)), seeded(lambda: Stream(nn.LayerNorm(8), dead=())), normal(2, 5, 4))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0
    assert reasons(history) == []


@pytest.mark.parametrize("eps", [1e-6, 0.5, None])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_is_told_how_many_channels_there_were(eps: float | None, affine: bool) -> None:
    module = seeded(lambda: Stream(nn.RMSNorm(8, eps=eps, elementwise_affine=affine)))
    program, history = rewrite(EliminateDead(("hidden",)), module, normal(2, 5, 4))
    assert program.weight("first.weight").shape == (6, 4)
    assert all(node.args[1] == [6] for node in program.nodes(aten.rms_norm.default))
    assert reasons(history) == []


def test_zeros_are_put_back_for_a_layer_norm() -> None:
    program, history = rewrite(EliminateDead(("hidden",)), seeded(lambda: Stream(nn.LayerNorm(8))), normal(2, 5, 4))
    assert program.weight("up.weight").shape == (12, 6)
    assert all(node.args[1] == [8] for node in program.nodes(aten.layer_norm.default))
    assert calls(program, aten.constant_pad_nd.default) == 2
    assert reasons(history) == []


def test_a_layer_norm_without_weights_makes_something_of_zero() -> None:
    module = seeded(lambda: Stream(nn.LayerNorm(8, elementwise_affine=False)))
    program, _ = rewrite(EliminateDead(("hidden",)), module, normal(2, 5, 4))
    assert program.weight("first.weight").shape == (8, 4)


def test_an_unread_channel_of_a_norm_without_weights_goes() -> None:
    module = seeded(lambda: Stream(nn.LayerNorm(8, elementwise_affine=False)))
    with torch.no_grad():
        for layer in (module.up, module.last):
            layer.weight[:, [1, 6]] = 0
    program, _ = rewrite(EliminateDead(("hidden",)), module, normal(2, 5, 4))
    assert program.weight("first.weight").shape == (6, 4)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_channels_go_from_real_architectures(name: str) -> None:
    program, samples = program_of(name)
    width = sites_of(program).attention[0].residual
    before = program.fact(axes).axis(width, -1).size
    zero_channels(program, [0, 5, 7])
    after, history = eliminate(PASS, program, samples)
    assert after.fact(axes).axis(sites_of(after).attention[0].residual, -1).size == before - 3
    assert after.parameter_count < program.parameter_count
    assert reasons(history) == []


def test_channels_given_back_are_put_back_as_zeros() -> None:
    class Given(Stream):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    program, history = rewrite(EliminateDead(("hidden",)), seeded(lambda: Given(nn.RMSNorm(8))), normal(2, 5, 4))
    assert program.weight("first.weight").shape == (6, 4)
    assert calls(program, aten.index_select.default) == 1
    assert calls(program, aten.matmul.default) == 0
    assert reasons(history) == []


@every_backend
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_composes(backend: Backend, norm: type[nn.Module]) -> None:
    module, x = seeded(lambda: Stream(norm(8))), normal(2, 5, 4)
    compiled = captures.compile(module, x, passes=f"exact,{PASS}", backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
