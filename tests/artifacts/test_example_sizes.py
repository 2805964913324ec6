"""Tests of lissom.artifacts.example_sizes: sizes at which a program's text is read."""

from __future__ import annotations

import itertools

import sympy

from lissom.artifacts.example_sizes import default_sizes, other_sizes

SYMBOLS = {name: sympy.Symbol(name, integer=True, positive=True) for name in ("batch", "samples", "tokens")}
TEXT = """\
program Stem(x: f32[batch, samples], ids: i64[batch, tokens]) {
  %conv1d: (f32[batch, ((samples//20)) - 1], none) = a()
  %conv1d_1: f32[batch, (((((samples//20)) - 11)//2)) + 1] = b()
  %item: int u0 = c()
  %slice: f32[batch, tokens + 1, u0] = d()
  %broken: f32[batch
"""


def test_defaults_differ_and_given_sizes_stay():
    assert default_sizes(SYMBOLS, {}) == {"batch": 4, "samples": 16, "tokens": 8}
    assert default_sizes(SYMBOLS, {"tokens": 5})["tokens"] == 5


def test_sizes_are_multiples_that_leave_no_small_tensor():
    sizes = [*other_sizes(TEXT, SYMBOLS, {})]
    assert sizes[0] == {"batch": 4, "samples": 260, "tokens": 8}
    assert sizes[1] == {"batch": 8, "samples": 520, "tokens": 16}
    assert len(sizes) == 8
    for first, second in itertools.pairwise(sizes):
        assert first["samples"] < second["samples"] and second["samples"] % 20 == 0


def test_given_sizes_are_not_exchanged():
    assert {sizes["samples"] for sizes in other_sizes(TEXT, SYMBOLS, {"samples": 30})} == {30}


def test_huge_and_zero_divisors_are_left_out():
    text = "  %a: f32[samples//99999999999999999999] = a()\n  %b: f32[samples//(tokens*0)] = b()\n"
    assert all(max(sizes.values()) < 1 << 20 for sizes in other_sizes(text, SYMBOLS, {}))


def test_many_sizes_take_few_attempts():
    symbols = {f"s{i}": sympy.Symbol(f"s{i}", integer=True, positive=True) for i in range(300)}
    assert len([*other_sizes("", symbols, {})]) <= 8
