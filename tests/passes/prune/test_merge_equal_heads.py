"""Tests of merge-equal-heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.ir.editor import Editor
from lissom.frontends.generation.decoder import capture_decoder
from lissom.passes.prune.merge_equal_heads import MergeEqualHeads, largest_group
from tests.support import captures
from tests.support.canonical_programs import reasons
from tests.support.dead_structure import eliminate, program_of, sites_of
from tests.support.decoders import decoder
from tests.support.harness import apply, aten, calls, check_golden, every_backend, rewrite
from tests.support.models import normal, seeded

pytestmark = pytest.mark.usefixtures("shared_captures")
PASS = "merge-equal-heads"


class Attention(nn.Module):
    """Self-attention of four heads of two features, whose keys and values are equal in so many neighbours."""

    def __init__(self, equal: int = 2, norm: int = 0, values: bool = True, grouped: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.RMSNorm(norm) if norm else nn.Identity()
        self.grouped = grouped
        with torch.no_grad():
            for layer in (self.k, self.v) if values else (self.k,):
                for weight in (layer.weight, layer.bias):
                    heads = weight.view(4 // equal, equal, 2, -1)
                    heads[:] = heads[:, :1].clone()

    def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
        split = [layer(x).unflatten(-1, (4, 2)) for layer in (self.q, self.k, self.v)]
        if self.norm.__class__ is nn.RMSNorm and self.norm.normalized_shape == (2,):
            split[:2] = [self.norm(item) for item in split[:2]]
        return [item.transpose(1, 2) for item in split]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_rewrites() -> None:
    _, history = rewrite(MergeEqualHeads(), seeded(Attention), normal(2, 5, 8))
    check_golden("merge_equal_heads", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(MergeEqualHeads(), seeded(lambda: Attention(equal=1)), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].rewritten == 0
    assert reasons(history) == []


@pytest.mark.parametrize(("equal", "norm"), [(2, 0), (4, 0), (2, 2), (4, 2)])
def test_numbers(equal: int, norm: int) -> None:
    module, x = seeded(lambda: Attention(equal, norm)), normal(2, 5, 8)
    program, _ = rewrite(MergeEqualHeads(), module, x)
    site = sites_of(program).attention[0]
    assert (site.heads, site.key_value_heads) == (4, 4 // equal)
    q, k, v = (item.double() for item in module.heads(x))
    mixed = [(q[:, head] @ k[:, head].mT / 2**0.5).softmax(-1) @ v[:, head] for head in range(4)]
    wanted = x + module.out.double()(torch.cat(mixed, -1))
    module.float()
    with torch.no_grad():
        # Sums of 8 terms in float32.
        torch.testing.assert_close(program(x).double(), wanted, rtol=0, atol=1e-5)


def test_attention_that_groups_by_itself_reads_fewer_heads() -> None:
    program, _ = rewrite(MergeEqualHeads(), seeded(lambda: Attention(grouped=True)), normal(2, 5, 8))
    assert calls(program, aten.expand.default) == 0
    assert sites_of(program).attention[0].key_value_heads == 2


def test_heads_whose_values_differ_stay() -> None:
    _, history = rewrite(MergeEqualHeads(), seeded(lambda: Attention(values=False)), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]


def test_a_last_bit_makes_heads_differ() -> None:
    module = seeded(Attention)
    with torch.no_grad():
        module.k.weight[0, 0] = torch.nextafter(module.k.weight[0, 0], torch.tensor(9.0))
    _, history = rewrite(MergeEqualHeads(), module, normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]


def test_keys_that_something_else_reads_stay() -> None:
    class Read(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.more(self.k(x))

    program, history = rewrite(MergeEqualHeads(), seeded(Read), normal(2, 5, 8))
    assert sites_of(program).attention[0].key_value_heads == 4
    (reason,) = reasons(history)
    assert reason.startswith("its key and value heads stay: 'linear") and reason.endswith("reads them too")


def test_keys_normed_over_all_heads_stay() -> None:
    class Normed(Attention):
        def heads(self, x: torch.Tensor) -> list[torch.Tensor]:
            split = (self.norm(self.q(x)), self.norm(self.k(x)), self.v(x))
            return [item.unflatten(-1, (4, 2)).transpose(1, 2) for item in split]

    _, history = rewrite(MergeEqualHeads(), seeded(lambda: Normed(norm=8)), normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    (reason,) = reasons(history)
    assert reason.endswith("an operator reads all of it at once, so its length changes the numbers")


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_real_models(name: str) -> None:
    program, samples = program_of(name)
    edit = Editor(program, "equal")
    for index, site in enumerate(sites_of(program).attention):
        for layer, offset in ((site.k[0], 1), (site.v[0], 2)):
            for item in layer.all_input_nodes:
                weight = program.weight(str(item.target)).detach().clone() if item.op == "get_attr" else None
                if weight is None:
                    continue
                dim = weight.dim() - 1 if name == "gpt2" else 0
                rows = weight.movedim(dim, 0)
                count = site.key_value_heads * site.head_dim
                made = rows[offset * count : (offset + 1) * count] if name == "gpt2" else rows
                heads = made.unflatten(0, (site.key_value_heads, -1))
                heads[1:] = heads[:1].clone()
                edit.set_weight(item, weight)
        assert index < 2
    after, history = eliminate(PASS, program, samples)
    assert [site.key_value_heads for site in sites_of(after).attention] == [1, 1]
    assert [site.heads for site in sites_of(after).attention] == [site.heads for site in sites_of(program).attention]
    assert reasons(history) == []


def test_the_cache_shrinks() -> None:
    captured = capture_decoder(decoder("llama"), max_length=16)
    program = captured.program
    edit = Editor(program, "equal")
    for node in [
        node for node in program.graph.nodes if node.op == "get_attr" and ("k_proj" in node.target or "v_proj" in node.target)
    ]:
        heads = program.weight(str(node.target)).detach().unflatten(0, (2, -1))
        edit.set_weight(node, heads[:1].expand_as(heads).flatten(0, 1).contiguous())
    after, history = apply(f"exact,{PASS}", program, captured.example)
    assert {tuple(after.weight(name).shape) for name in after.state} == {(1, 1, 16, 8)}
    assert history.steps[-1].notes == ("the cache takes 0.00205 MB, and took 0.0041 MB",)


def test_heads_that_keep_different_things_stay() -> None:
    captured = capture_decoder(decoder("llama"), max_length=16)
    with torch.no_grad():
        captured.program.run(captured.samples[0])
    after, _ = apply(f"exact,{PASS}", captured.program, captured.example)
    assert {tuple(after.weight(name).shape) for name in after.state} == {(1, 2, 16, 8)}


def test_the_largest_group_of_equal_heads() -> None:
    heads = torch.tensor([1.0, 1, 1, 1, 2, 2])[:, None]
    assert largest_group([heads], 6) == 2
    assert largest_group([heads[:4]], 4) == 4
    assert largest_group([heads, torch.arange(6.0)[:, None]], 6) == 1


@every_backend
def test_composes(backend: Backend) -> None:
    module, x = seeded(Attention), normal(2, 5, 8)
    compiled = captures.compile(module, x, passes=f"exact,{PASS}", backend=backend)
    with torch.no_grad():
        # Sums of 8 terms in float32, in another order.
        torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=1e-5)
    assert any(step.spelling == PASS and step.rewritten == 4 for step in compiled.report.history.steps)
