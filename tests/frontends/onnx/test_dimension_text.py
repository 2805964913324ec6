"""Tests of lissom.frontends.onnx.dimension_text: formulas are computed, everything else is a name, and nothing is evaluated."""

import pytest

from lissom.frontends.onnx.dimension_text import LARGEST, LONGEST, NoFormulaError, names_in, size_of

SIZES = {"past": 8, "new": 3, "batch": 2, "s0": 9, "unk__12": 5}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("past", 8),
        ("unk__12", 5),
        ("past + new", 11),
        ("batch*8", 16),
        ("floor(new/2 + 1)", 2),
        ("ceiling(new/2)", 2),
        ("((s0//2)) + 1", 5),
        ("CeilToInt(IntTrueDiv(s0, 2))", 5),
        ("TruncToInt(s0/2)", 4),
        ("Max(1, past - 10)", 1),
        ("Min(past, new)", 3),
        ("Mod(s0, 4) + s0 % 5", 5),
        ("s0**2", 81),
        ("-new + past", 5),
        (" 7 ", 7),
    ],
)
def test_a_formula_as_exporters_write_it_is_computed(text, size):
    assert size_of(text, SIZES) == size


@pytest.mark.parametrize(
    "text",
    [
        "encoder.layer_dim_0",
        "batch size",
        "it's",
        "",
        "a\0b",
        "\ud800",
        "past if new else batch",
        "__import__('os').getpid()",
        "open('x')",
        "[past for past in new]",
        "past()",
        "f'{past}'",
        "1.5",
        "True",
        "unknown + 1",
        "9**9**9",
        "9**999999999",
        "(past**8)**8",
        f"{LARGEST} + 1",
        "1/past",
        "past/0",
        "past % 0",
        "past - past",
        "new - past",
        "Max(past, key=new)",
        "+".join("1" * LONGEST),
        "(" * 99 + "1" + ")" * 100,
    ],
)
def test_what_is_no_formula_or_no_size_is_name(text):
    with pytest.raises(NoFormulaError):
        size_of(text, SIZES)


def test_names_of_formula_come_in_order_without_its_functions():
    assert names_in("Max(past, new) * batch + past") == ["past", "new", "batch"]
