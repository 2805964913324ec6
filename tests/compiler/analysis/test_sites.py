"""Tests of lissom.compiler.analysis.sites: who owns which node."""

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.sites import sites
from lissom.compiler.ir.printer import target_text
from lissom.frontends.capture.export import capture
from tests.support.models import CASES, captured, normal, seeded


def kinds(program):
    return [(site.kind, site.layer) for site in program.fact(sites)]


def operators(program, kind):
    return [[target_text(node.target) for node in site.nodes] for site in program.fact(sites) if site.kind == kind]


@pytest.mark.parametrize("name", CASES)
def test_every_call_is_in_one_site_in_graph_order(name):
    program = captured(name)
    order = {node: index for index, node in enumerate(program.nodes())}
    found = program.fact(sites)
    assert sorted(order[node] for site in found for node in site.nodes) == list(range(len(order)))
    assert all([order[node] for node in site.nodes] == sorted(order[node] for node in site.nodes) for site in found)


def test_layers_come_first_in_the_order_of_the_graph():
    assert kinds(captured("llama")) == [
        ("attention", "model.layers.0"),
        ("feed-forward", "model.layers.0"),
        ("attention", "model.layers.1"),
        ("feed-forward", "model.layers.1"),
        ("embedding", ""),
        ("LM head", ""),
        ("other", ""),
    ]


def test_an_attention_owns_its_projections_and_what_is_between():
    (first, second) = operators(captured("bert"), "attention")
    assert first == second
    assert first.count("aten.linear") == 4
    assert first.count("aten.scaled_dot_product_attention") == 1
    assert not {"aten.layer_norm", "aten.add.Tensor", "aten.embedding"} & set(first)


def test_rotation_belongs_to_attention_and_tables_do_not():
    program = captured("llama")
    (first, _) = operators(program, "attention")
    assert first.count("aten.neg") == 2
    assert not {"aten.cos", "aten.sin"} & set(first)
    assert {"aten.cos", "aten.sin"} <= set(*operators(program, "other"))


def test_a_gated_feed_forward_owns_gate_and_product():
    (first, _) = operators(captured("llama"), "feed-forward")
    assert sorted(first) == ["aten.linear", "aten.linear", "aten.linear", "aten.mul.Tensor", "aten.silu"]


def test_product_in_no_site_has_kind_of_its_own():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x).cumsum(1)
            return self.second(x @ x.transpose(1, 2) @ x).cumsum(1)

    program = capture(seeded(Mixer), (normal(2, 3, 4),), dynamic=False).program
    assert operators(program, "product") == [["aten.linear", "aten.matmul", "aten.matmul", "aten.linear"]]


def test_attention_without_projections_is_a_site_of_its_own():
    class Bare(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    program = capture(Bare(), (normal(1, 2, 3, 4),), dynamic=False).program
    (node,) = program.nodes(torch.ops.aten.scaled_dot_product_attention.default)
    (site,) = program.fact(sites)
    assert (site.kind, site.nodes) == ("attention", (node,))
