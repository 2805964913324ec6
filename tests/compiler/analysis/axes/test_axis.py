"""Axes as trees: products, sums, unification and the ways they refine each other."""

import sympy
from hypothesis import given
from hypothesis import strategies as st

from lissom.compiler.analysis.axes.axis import Axis, concatenation, cut, divide, mark, pin, product, quotient, unify


def sizes(axis: Axis) -> list[object]:
    return [atom.size for atom in axis.atoms()]


def test_unified_atoms_are_one_axis():
    a, b = Axis(4), Axis(4)
    unify(a, b, "test")
    assert a.find() is b.find()


def test_a_product_refines_the_atom_it_is_unified_with():
    hidden, heads = Axis(12), product([Axis(3), Axis(4)])
    unify(hidden, heads, "test")
    assert sizes(hidden) == [3, 4]


def test_products_split_at_different_places_meet_in_common_refinement():
    left, right = product([Axis(4), Axis(6)]), product([Axis(12), Axis(2)])
    unify(left, right, "test")
    assert list(left.atoms()) == list(right.atoms())
    assert sizes(left) == [4, 3, 2]


def test_sums_split_at_different_places_meet_in_common_refinement():
    left, right = concatenation([Axis(2), Axis(6)]), concatenation([Axis(5), Axis(3)])
    unify(left, right, "test")
    assert list(left.atoms()) == list(right.atoms())
    assert sizes(left) == [2, 3, 3]


def test_products_that_do_not_divide_are_pinned_with_reason():
    left, right = product([Axis(2), Axis(9)]), product([Axis(3), Axis(6)])
    unify(left, right, "two views of one dimension")
    assert {atom.pinned for atom in left.atoms()} == {"two views of one dimension"}


def test_axes_of_different_sizes_are_pinned_not_merged():
    left, right = Axis(2), Axis(3)
    unify(left, right, "added")
    assert left.find() is not right.find()
    assert left.pinned == right.pinned == "added"


def test_a_product_and_a_sum_do_not_agree():
    left, right = product([Axis(2), Axis(3)]), concatenation([Axis(2), Axis(4)])
    unify(left, right, "joined")
    assert "one side is a product of axes, the other a sum" in next(left.atoms()).pinned


def test_flags_follow_an_atom_into_what_it_becomes():
    hidden = Axis(6)
    mark(hidden, whole=True)
    pin(hidden, "an output of the program")
    unify(hidden, product([Axis(2), Axis(3)]), "test")
    assert all(atom.whole and atom.pinned == "an output of the program" for atom in hidden.atoms())


def test_a_product_is_cut_between_its_rows():
    heads = product([Axis(4), Axis(5)])
    first, rest = cut(heads, 15) or (None, None)
    assert first is not None and rest is not None
    assert (sizes(first), sizes(rest)) == ([3, 5], [1, 5]) or (sizes(first), sizes(rest)) == ([3, 5], [5])


def test_a_product_is_not_cut_inside_a_row():
    assert cut(product([Axis(4), Axis(5)]), 7) is None


def test_quotients_of_symbolic_sizes():
    batch, tokens = sympy.symbols("batch tokens", positive=True, integer=True)
    assert quotient(batch * tokens, batch) == tokens
    assert quotient(6 * batch, 2 * batch) == 3
    assert quotient(batch, tokens) is None
    assert quotient(7, 2) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 60))
def test_dividing_keeps_the_size_and_the_order(parts: list[int], size: int):
    axis = product([Axis(part) for part in parts])
    whole = axis.size
    pieces = divide(axis, size)
    if pieces is not None:
        assert pieces[0].size == size
        assert pieces[0].size * pieces[1].size == whole
        assert [atom.size for atom in axis.atoms() if atom.size != 1] == [
            atom.size for piece in pieces for atom in piece.atoms() if atom.size != 1
        ]
