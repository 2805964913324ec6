"""Tests of lissom.inspect.folding."""

from __future__ import annotations

from lissom.inspect.folding import fold_rows


def test_rows_that_differ_in_number_of_layer_are_one():
    rows = [("layers.0", "4 heads"), ("layers.1", "4 heads"), ("layers.2", "4 heads")]
    assert fold_rows(rows) == [("layers.0-2 ×3", "4 heads")]


def test_rows_of_two_kinds_keep_their_first_order():
    rows = [(f"layers.{index}", "all" if index % 6 == 5 else "window") for index in range(12)]
    assert fold_rows(rows) == [("layers.0-4,6-10 ×10", "window"), ("layers.5,11 ×2", "all")]


def test_rows_with_other_figures_or_names_stay():
    rows = [("1", "layers.0.up"), ("2", "layers.1.up"), ("1", "layers.2.down"), ("3", "norm")]
    assert fold_rows(rows, label=1) == rows


def test_only_the_first_number_may_differ():
    rows = [("blocks.0.1", "x"), ("blocks.0.2", "x"), ("conv2d", "x"), ("conv3d", "x")]
    assert fold_rows(rows) == rows


def test_equal_rows_without_a_number_are_counted():
    assert fold_rows([("norm", "x"), ("norm", "x")]) == [("norm ×2", "x")]
