"""Tests of eliminate-dead on neurons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.analysis.axes.columns import find_neuron_columns
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.dead_structure import eliminate, program_of, sites_of, zero_bias, zero_neurons
from tests.support.harness import every_backend, rewrite
from tests.support.models import FeedForward, normal, seeded

PASS = "eliminate-dead{units=[neurons]}"


def half_dead() -> nn.Module:
    module = FeedForward()
    with torch.no_grad():
        module.down.weight[:, ::2] = 0
    return module


class Gated(nn.Module):
    """A gated feed-forward, its gate and up projection one layer if packed."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.up, self.gate, self.both = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 24)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.both(x).chunk(2, -1) if self.packed else (self.up(x), self.gate(x))
        return x + self.down(nn.functional.silu(gate) * up)


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(EliminateDead(("neurons",)), seeded(FeedForward), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0
    assert reasons(history) == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_up_and_down_lose_what_is_dead(name: str) -> None:
    program, samples = program_of(name)
    site = sites_of(program).feed_forward[0]
    zero_neurons(program, 0, [0, 3, site.width - 1])
    after, history = eliminate(PASS, program, samples)
    found = sites_of(after).feed_forward[0]
    assert found.width == site.width - 3
    sides = 1 + len(site.up)
    biases = 3 if name in ("bert", "gpt2") else 0
    hidden = program.weight(str(find_neuron_columns(program, site).weight.target)).numel() // site.width
    assert program.parameter_count - after.parameter_count == 3 * sides * hidden + biases
    assert reasons(history) == []


@pytest.mark.parametrize("packed", [False, True])
def test_gate_and_up_lose_the_same_neurons(packed: bool) -> None:
    module = seeded(lambda: Gated(packed))
    with torch.no_grad():
        module.down.weight[:, [2, 5, 11]] = 0
    program, history = rewrite(EliminateDead(("neurons",)), module, normal(2, 5, 8))
    shapes = {name: tuple(weight.shape) for name, weight in program.weights().items()}
    assert shapes["down.weight"] == (8, 9)
    assert shapes.get("both.weight", (18, 8)) == (18, 8)
    assert shapes.get("up.weight", (9, 8)) == shapes.get("gate.weight", (9, 8)) == (9, 8)
    assert reasons(history) == []


@pytest.mark.parametrize("side", ["up", "gate"])
def test_a_neuron_whose_activation_is_zero_is_dead(side: str) -> None:
    module = seeded(lambda: Gated(packed=False))
    with torch.no_grad():
        getattr(module, side).weight[4:6] = 0
        getattr(module, side).bias[4:6] = 0
    program, _ = rewrite(EliminateDead(("neurons",)), module, normal(2, 5, 8))
    assert sites_of(program).feed_forward[0].width == 10


def test_a_neuron_with_a_bias_alone_is_alive() -> None:
    module = seeded(FeedForward)
    with torch.no_grad():
        module.up.weight[4:6] = 0
    program, _ = rewrite(EliminateDead(("neurons",)), module, normal(2, 5, 8))
    assert sites_of(program).feed_forward[0].width == 12


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bias", [True, False])
def test_feed_forward_without_living_neuron_is_its_bias(name: str, bias: bool) -> None:
    program, samples = program_of(name)
    site = sites_of(program).feed_forward[0]
    zero_neurons(program, 0, range(site.width))
    if not bias and name != "llama":
        zero_bias(program, site.down)
    after, history = eliminate(PASS, program, samples)
    assert len(sites_of(after).feed_forward) == len(sites_of(program).feed_forward) - 1
    assert reasons(history) == []


def test_neurons_that_a_norm_reads_together_are_reported() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)
            with torch.no_grad():
                self.down.weight[:, :4] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.norm(nn.functional.relu(self.up(x))))

    program, history = rewrite(EliminateDead(("neurons",)), seeded(Normed), normal(2, 5, 8))
    assert program.weight("down.weight").shape == (8, 12)
    assert reasons(history) == ["dead neurons stay: an operator reads all of it at once, so its length changes the numbers"]


@every_backend
def test_composes(backend: Backend) -> None:
    module, x = seeded(half_dead), normal(2, 5, 8)
    compiled = captures.compile(module, x, passes=f"exact,{PASS}", backend=backend)
    with torch.no_grad():
        # Sums of 12 terms in float32, in another order.
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
