"""Declared dimensions: how a declaration is read, how its forms fit a call, and that it agrees with the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lissom.artifacts.program_text import parse_program
from lissom.compiler.analysis.axes.axes import axes
from lissom.compiler.ir import dimensions
from lissom.compiler.ir.dimensions import ATEN, Compound, Named, check_declaration, contradiction, multiplications, named
from lissom.ops.dimensions import DECLARED, Dimensions

aten = torch.ops.aten
EVERY = {**ATEN, **DECLARED}
HEADS, PAIRS = Compound(("g", "r")), Compound(("p", "p"), product=False)


def call(inputs: str, line: str) -> Named:
    """The last call of a program with these inputs, with the names of its dimensions."""
    text = f"program Call({inputs}) {{\n  {line}\n  return [%call]\n}}\n"
    (node,) = parse_program(text).nodes()
    found = named(node)
    assert found is not None
    assert not contradiction(node)
    return found


@pytest.mark.parametrize("target", EVERY, ids=str)
def test_declarations_fit_the_schemas(target: Any) -> None:
    check_declaration(target, EVERY[target])


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (Dimensions("... k -> ... k"), "has 3 tensors, and 1 are declared"),
        (Dimensions("... k, n k, +n -> ... n, n"), "returns 1 values"),
        (Dimensions("... k, n k, +n -> ... n if causal"), "has no argument causal"),
        (Dimensions("... k, n k, +n -> ... n", whole="t"), "has no dimension t"),
        (Dimensions("... k, n k, +n -> ... n", factors=("x",)), "has no tensor x"),
        (Dimensions("... k, n k, +n"), "no form of dimensions"),
        (Dimensions("... k, n %k, +n -> ... n"), "does not name dimensions from ' %k' on"),
    ],
)
def test_declarations_that_contradict_a_schema_are_refused(declared: Dimensions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_declaration(aten.linear.default, declared)


def test_results_of_other_sizes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = call("x: f32[3, 5], w: f32[5, 5]", "%call: f32[3, 5] = aten.mm(%x, %w)")
    monkeypatch.setattr(dimensions, "ATEN", {aten.mm.default: Dimensions("m k, k n -> k n")})
    assert contradiction(found.node) == "aten.mm.default is declared to return [5, 5] and returns [3, 5]"


def test_a_linear_layer_sums_over_its_inputs() -> None:
    found = call("x: f32[2, 3, 4], w: f32[5, 4], b: f32[5]", "%call: f32[2, 3, 5] = aten.linear(%x, %w, %b)")
    assert [item.dims for item in found.operands] == [(".2", ".1", "k"), ("n", "k"), ("n",)]
    assert (found.results, found.summed) == (((".2", ".1", "n"),), ("k",))
    assert multiplications(found.node) == 2 * 3 * 4 * 5


def test_query_heads_share_key_heads() -> None:
    inputs = "q: f32[2, 8, 3, 4], k: f32[2, 2, 5, 4], v: f32[2, 2, 5, 6]"
    found = call(inputs, "%call: f32[2, 8, 3, 6] = aten.scaled_dot_product_attention(%q, %k, %v, enable_gqa=True)")
    assert found.results == ((".1", HEADS, "q", "v"),)
    assert (found.sizes["g"], found.sizes["r"], found.summed, found.whole) == (2, 4, ("d",), {"t"})
    assert multiplications(found.node) == 2 * 8 * 3 * 5 * (4 + 6)


def test_sizes_of_one_are_broadcast() -> None:
    inputs = "q: f32[2, 8, 3, 4], k: f32[2, 8, 5, 4], v: f32[2, 8, 5, 6], mask: f32[2, 1, 1, 5]"
    found = call(inputs, "%call: f32[2, 8, 3, 6] = aten.scaled_dot_product_attention(%q, %k, %v, %mask)")
    assert found.operands[3].dims == (".2", "", "", "t")


@pytest.mark.parametrize(
    ("width", "options", "turned", "table"),
    [
        (4, "", PAIRS, "p"),
        (8, "", PAIRS, PAIRS),
        (4, ", interleaved=True", Compound(("p", "2")), "p"),
        (8, ", interleaved=True", Compound(("p", "2")), Compound(("p", "2"))),
    ],
)
def test_rotary_pairs_are_halves_or_neighbours(width: int, options: str, turned: Compound, table: object) -> None:
    inputs = f"x: f32[2, 3, 5, 8], cos: f32[5, {width}], sin: f32[5, {width}]"
    found = call(inputs, f"%call: f32[2, 3, 5, 8] = lissom.rotary(%x, %cos, %sin{options})")
    assert (found.results[0][-1], found.operands[1].dims) == (turned, (".1", table))


def test_a_dimension_may_be_missing_at_the_end() -> None:
    inputs = "q: f32[2, 3, 4, 5], k: f32[2, 3, 4, 5], v: f32[2, 3, 4, 6], decay: f32[2, 3, 4], beta: f32[2, 3, 4]"
    line = (
        "%call: (f32[2, 3, 4, 6], f32[2, 4, 5, 6]) = "
        "lissom.gated_delta_rule(%q, %k, %v, %decay, %beta, scale=0.5, normalizes=True)"
    )
    values = "%values: f32[2, 3, 4, 6] = operator.getitem(%call, 0)"
    text = f"program Call({inputs}) {{\n  {line}\n  {values}\n  return [%values]\n}}\n"
    node = parse_program(text).nodes()[0]
    found = named(node)
    assert found is not None
    assert found.operands[3].dims == ("batch", "tokens", "heads")
    assert found.results == (("batch", "tokens", "heads", "channels"), ("batch", "heads", "states", "channels"))
    assert multiplications(node) == 4 * 2 * 3 * 4 * 5 * 6


def test_an_einsum_is_its_own_declaration() -> None:
    found = call("x: f32[2, 3, 4], y: f32[4, 5]", '%call: f32[2, 3, 5] = aten.einsum("...kN,Nm->...km", [%x, %y])')
    assert (found.results, found.summed) == (((".1", "k", "m"),), ("n_n",))
    assert named(found.node) is not None


def test_what_no_form_fits_is_pinned() -> None:
    text = """\
program Diagonals(x: f32[2, 5, 5]) {
  %einsum: f32[2, 5] = aten.einsum("bii->bi", [%x])
  return [%einsum]
}
"""
    program = parse_program(text)
    (node,) = program.nodes()
    assert named(node) is None
    assert program.fact(axes).axis(node, 1).pinned == "no rule for aten.einsum"
