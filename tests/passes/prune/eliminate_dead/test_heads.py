"""Tests of eliminate-dead on heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.analysis.axes.columns import find_head_columns
from lissom.frontends.generation.decoder import capture_decoder
from lissom.passes.prune.eliminate_dead.eliminate_dead import EliminateDead
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.dead_structure import eliminate, program_of, sites_of, zero_bias, zero_heads
from tests.support.decoders import decoder
from tests.support.harness import aten, calls, every_backend, rewrite
from tests.support.models import normal, seeded
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")
PASS = "eliminate-dead{units=[heads]}"


class Attention(nn.Module):
    """Self-attention of four heads of two features, two of them dead."""

    def __init__(self, dead: tuple[int, ...] = (1, 3), norm: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.RMSNorm(8) if norm else nn.Identity()
        with torch.no_grad():
            self.out.weight.view(8, 4, 2)[:, dead] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.norm(self.q(x)), self.norm(self.k(x)), self.v(x)
        q, k, v = (item.unflatten(-1, (4, 2)).transpose(1, 2) for item in (q, k, v))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(EliminateDead(("heads",)), seeded(lambda: Attention(dead=())), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0
    assert reasons(history) == []


@pytest.mark.parametrize("name", all_but_slow(["bert", "gpt2", "llama", "t5"], "bert", "gpt2", "llama"))
def test_every_projection_loses_the_rows_of_a_dead_head(name: str) -> None:
    program, samples = program_of(name)
    heads, site = sites_of(program).attention[0].heads, sites_of(program).attention[0]
    groups = site.key_value_heads
    dead = {group * (heads // groups) for group in range(groups)} if groups < heads else {1}
    zero_heads(program, 0, dead)
    after, history = eliminate(PASS, program, samples)
    found = sites_of(after).attention[0]
    assert found.heads == heads - len(dead)
    assert find_head_columns(after, found).count == heads - len(dead)
    width = program.weight(str(find_head_columns(program, site).weight.target)).numel() // heads
    biases = site.head_dim * len(dead)
    projections = 2 if groups < heads else 4
    lost = program.parameter_count - after.parameter_count
    # The list of heads that a shared bias of positions is looked up with is new.
    chosen = sum(after.weight(name).numel() for name in after.weights() if name.endswith(".heads"))
    has_bias = name in ("bert", "gpt2")
    assert lost == projections * width * len(dead) + (biases * (projections - 1) if has_bias else 0) - chosen
    assert reasons(history) == []


def test_query_heads_go_from_every_group_alike() -> None:
    program, samples = program_of("llama")
    zero_heads(program, 0, [0, 3])
    after, history = eliminate(PASS, program, samples)
    site = sites_of(after).attention[0]
    assert (site.heads, site.key_value_heads) == (2, 2)
    assert reasons(history) == []


def test_head_alone_in_its_group_to_be_dead_stays() -> None:
    program, samples = program_of("llama")
    zero_heads(program, 0, [1])
    after, history = eliminate(PASS, program, samples)
    assert sites_of(after).attention[0].heads == 4
    assert reasons(history) == ["dead heads 1 stay: each group keeps as many as every other"]


def test_a_group_goes_with_the_last_of_its_heads() -> None:
    program, samples = program_of("llama")
    zero_heads(program, 0, [2, 3])
    after, history = eliminate(PASS, program, samples)
    site = sites_of(after).attention[0]
    assert (site.heads, site.key_value_heads) == (2, 1)
    assert after.weight(str(site.k[0].args[1].target)).shape[0] == site.head_dim
    assert reasons(history) == []


def test_layers_that_share_bias_lose_heads_of_their_own() -> None:
    program, samples = program_of("t5")
    zero_heads(program, 0, [0])
    zero_heads(program, 1, [1])
    after, history = eliminate(PASS, program, samples)
    assert [site.heads for site in sites_of(after).attention[:2]] == [1, 1]
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert after.weight(bias).shape == program.weight(bias).shape
    assert reasons(history) == []


def test_queries_normed_over_all_heads_stay_whole() -> None:
    program, history = rewrite(EliminateDead(("heads",)), seeded(lambda: Attention(norm=True)), normal(2, 5, 8))
    site = sites_of(program).attention[0]
    assert site.heads == 2
    assert program.weight("q.weight").shape == (8, 8)
    assert program.weight("v.weight").shape == (4, 8)
    assert program.weight("out.weight").shape == (8, 4)
    assert reasons(history) == []


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_attention_without_a_living_head_is_its_bias(name: str, bias: bool) -> None:
    program, samples = program_of(name)
    site = sites_of(program).attention[0]
    zero_heads(program, 0, range(site.heads))
    if not bias and name != "llama":
        zero_bias(program, site.output)
    after, history = eliminate(PASS, program, samples)
    assert len(sites_of(after).attention) == len(sites_of(program).attention) - 1
    assert reasons(history) == []


def test_heads_whose_values_are_zero_are_dead() -> None:
    module = seeded(lambda: Attention(dead=()))
    with torch.no_grad():
        module.v.weight[2:4] = 0
        module.v.bias[2:4] = 0
    program, _ = rewrite(EliminateDead(("heads",)), module, normal(2, 5, 8))
    assert sites_of(program).attention[0].heads == 3


def test_projection_reading_more_than_heads_is_no_constant() -> None:
    class Fused(Attention):
        def __init__(self) -> None:
            super().__init__(dead=())
            self.out, self.up = nn.Linear(14, 8), nn.Linear(8, 6)
            with torch.no_grad():
                self.out.weight[:, :8] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return x + self.out(torch.cat((heads, nn.functional.gelu(self.up(x))), -1))

    program, _ = rewrite(EliminateDead(("heads",)), seeded(Fused), normal(2, 5, 8))
    assert program.weight("up.weight").shape == (6, 8)
    assert program.weight("v.weight").shape[0] in (2, 8)


def test_a_cache_keeps_living_heads_alone() -> None:
    captured = capture_decoder(decoder("gpt2"), max_length=16)
    program = captured.program
    zero_heads(program, 0, [1])
    after, _ = eliminate(PASS, program, list(captured.samples))
    assert [after.weight(name).shape[1] for name in after.state] == [3, 3, 4, 4]


def test_an_attention_that_nothing_projects_is_reported() -> None:
    class Bare(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    program, history = rewrite(EliminateDead(("heads",)), Bare(), normal(2, 2, 5, 8))
    assert calls(program, aten.scaled_dot_product_attention.default) == 1
    assert reasons(history) == ["no layer projects its heads out"]


@every_backend
def test_composes(backend: Backend) -> None:
    module, x = seeded(Attention), normal(2, 5, 8)
    compiled = captures.compile(module, x, passes=f"exact,{PASS}", backend=backend)
    with torch.no_grad():
        # Sums of 8 terms in float32, in another order.
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
    assert sites_of(compiled.program).attention == () or compiled.program.parameter_count < 4 * 72


class InTheBatch(Attention):
    """Heads folded into the batch, with a mask for each row repeated for its heads; or queries split along the tokens."""

    def __init__(self, *, split: bool) -> None:
        super().__init__()
        self.split = split

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (layer(x).view(rows, tokens, 4, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.split:
            first, others = q.split([1, tokens - 1], 2)
            found = nn.functional.scaled_dot_product_attention(torch.cat([first * 2, others], 2), k, v)
        else:
            q, k, v = (item.reshape(rows * 4, tokens, 2) for item in (q, k, v))
            found = nn.functional.scaled_dot_product_attention(q, k, v, mask.repeat_interleave(4, 0))
            found = found.view(rows, 4, tokens, 2)
        return x + self.out(found.transpose(1, 2).reshape(rows, tokens, 8))


@pytest.mark.parametrize("split", [False, True])
def test_dead_heads_go_where_sizes_vary_beside_them(split: bool) -> None:
    model, mask = seeded(lambda: InTheBatch(split=split)), torch.ones(3, 5, 5, dtype=torch.bool).tril()
    with torch.no_grad():
        model.out.weight.view(8, 4, 2)[:, (1, 3)] = 0
    found = captures.optimize(model, (normal(3, 5, 8), mask), passes=f"exact,{PASS}").program
    assert found.weight("q.weight").shape == (4, 8)
    x, mask = normal(2, 4, 8, seed=1), torch.ones(2, 4, 4, dtype=torch.bool).tril()
    with torch.no_grad():
        # Float32 sums of fewer terms.
        torch.testing.assert_close(found(x, mask), model(x, mask), rtol=1e-5, atol=1e-6)


class Halves(Attention):
    """Queries whose first and second pair of heads go different ways and are joined again."""

    def __init__(self) -> None:
        super().__init__(dead=())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 2)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        first, second = q.split(2, 1)
        q = torch.cat([first, second * 2], 1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_heads_in_two_groups_are_not_dead() -> None:
    _, history = rewrite(EliminateDead(("heads",)), seeded(Halves), normal(2, 5, 8))
    assert history.steps[1].rewritten == 0
