"""Tests of lissom.artifacts.values, expression, operators and fields: what becomes JSON comes back, and nothing else does."""

import json
import math
import operator

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from lissom.artifacts.expression import decode_expression, encode_expression
from lissom.artifacts.operators import find_operator, operator_name
from lissom.artifacts.values import decode_argument, encode_argument
from lissom.errors import ArtifactError
from lissom.io.fields import take, take_list, text
from lissom.ops import packed_linear

aten = torch.ops.aten
S, T = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("u1", integer=True)


def through_json(data: object) -> object:
    return json.loads(json.dumps(data, allow_nan=False))


@pytest.mark.parametrize(
    "item",
    [
        *(None, True, False, 0, -3, 2**63 - 1, 1.0, -0.0, 1e-300, "text", "", math.inf, -math.inf, 2.5 + 1j),
        *([1, [2.0, "x"]], (1, (None,)), [], (), slice(1, None, 2), ..., torch.float32, torch.bool, torch.strided),
        *(torch.channels_last, torch.preserve_format, torch.device("cpu"), torch.device("cuda", 1)),
    ],
    ids=repr,
)
def test_an_argument_comes_back(item):
    again = decode_argument(through_json(encode_argument(item)))
    assert repr(again) == repr(item)
    assert type(again) is type(item)


def test_not_a_number_comes_back():
    assert math.isnan(decode_argument(through_json(encode_argument(math.nan))))


@pytest.mark.parametrize("item", [{1: 2}, torch.zeros(1), object(), b"bytes", {1}], ids=lambda item: type(item).__name__)
def test_another_argument_is_refused(item):
    with pytest.raises(ArtifactError, match="which an artifact cannot hold"):
        encode_argument(item)


@pytest.mark.parametrize(
    "data",
    [
        {"node": "unknown"},
        {"call": "os.system"},
        {"dtype": "load"},
        {"layout": "float32"},
        {"slice": [1]},
        {"device": "x:y"},
        {},
    ],
    ids=str,
)
def test_what_is_no_argument_is_refused(data):
    with pytest.raises(ValueError, match=r"is not an? "):
        decode_argument(data)


@pytest.mark.parametrize(
    "expression",
    [
        *(sympy.Integer(7), S, T, S + 1, 4 * S * T, S**2, FloorDiv(S, 4), Mod(S + T, 3), Max(S, T), sympy.Rational(1, 3) * S),
        *(sympy.Eq(Mod(S, 4), 0), sympy.And(S > 2, T <= 5), sympy.Ne(S, T), sympy.Not(sympy.Eq(S, T)), sympy.true),
        *(sympy.Float(0.1) * S, sympy.Piecewise((1, sympy.Eq(T, 1)), (0, True))),
    ],
    ids=str,
)
def test_an_expression_comes_back(expression):
    again = decode_expression(through_json(encode_expression(expression)), {"s0": S, "u1": T})
    assert again == expression
    assert str(again) == str(expression)


def test_another_function_of_sizes_is_refused():
    with pytest.raises(ArtifactError, match="the program has a size sin"):
        encode_expression(sympy.sin(S))


@pytest.mark.parametrize("data", ["s9", "__import__('os')", ["exec", "1"], ["Add", "s9"], {"a": 1}, None, 1.5, []], ids=str)
def test_what_is_no_expression_is_refused(data):
    with pytest.raises(ValueError, match="is not a size"):
        decode_expression(data, {"s0": S})


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.linear.default, "aten.linear.default"),
        (aten.add.Tensor, "aten.add.Tensor"),
        (aten.copy_.default, "aten.copy_.default"),
        (packed_linear, "lissom.packed_linear.default"),
        (operator.mul, "operator.mul"),
        (operator.getitem, "operator.getitem"),
        (math.ceil, "math.ceil"),
        (torch.sym_max, "torch.sym_max"),
        (FloorDiv, "size.FloorDiv"),
    ],
    ids=lambda item: getattr(item, "__name__", str(item)),
)
def test_an_operator_has_a_name(target, name):
    assert operator_name(target) == name
    assert find_operator(name) is target


@pytest.mark.parametrize(
    "target", [print, torch.add, aten.add_.Tensor, aten.from_file.default, eval], ids=lambda item: item.__name__
)
def test_another_function_is_refused(target):
    with pytest.raises(ArtifactError, match="which an artifact cannot hold: it is not on the list of operators"):
        operator_name(target)


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "builtins.eval", "operator.attrgetter", "aten.linear", "aten.linear.nothing", "aten.__class__.mro", ""),
        *("aten._dir.__add__", "lissom.__init__.default", "aten.from_file.default", "c10d.send.default", "math.factorial"),
    ],
)
def test_another_name_finds_nothing(name):
    with pytest.raises(ValueError, match="there is no operator"):
        find_operator(name)


def test_a_field_is_of_its_kind():
    assert take({"a": 1}, "a", int) == 1
    assert take_list({"a": ["x"]}, "a", text) == ("x",)
    for data in ({}, {"a": True}, {"a": "1"}, [], None):
        with pytest.raises(ValueError, match="'a'"):
            take(data, "a", int)
    with pytest.raises(ValueError, match="3 is not text"):
        take_list({"a": [3]}, "a", text)
