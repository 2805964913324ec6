"""Tests of lissom.artifacts.program_text: the inverse of the printer."""

from __future__ import annotations

import pytest
import torch

from lissom.artifacts.program_text import parse_program
from lissom.backends.eager.backend import Eager
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.samples import check_samples
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import ArtifactError, LissomError
from lissom.frontends.capture.export import capture
from lissom.passes import PASSES, RECIPES
from tests.support.models import CASES, capture_of, captured
from tools.zoo.catalogue import entries
from tools.zoo.entry import Entry

TWICE = """\
program Twice(x: f32[batch, 4]) {
  weight @up.weight: f32[4, 4]
  %linear: f32[batch, 4] = aten.linear(%x, @up.weight)  # up
  %mul: f32[batch, 4] = aten.mul.Tensor(%linear, 2.0)
  return [%mul]
}
"""
STEM = """\
program Stem(x: f32[batch, 1, samples]) {
  weight @0.weight: f32[4, 1, 40]
  weight @1.weight: f32[1, 4, 10]
  %conv1d: f32[batch, 4, ((samples//20)) - 1] = aten.conv1d(%x, @0.weight, None, [20])  # 0
  %conv1d_1: f32[batch, 1, (((((samples//20)) - 11)//2)) + 1] = aten.conv1d(%conv1d, @1.weight, None, [2])  # 1
  return [%conv1d_1]
}
"""
POSITIONS = """\
program Positions(x: f32[batch, 1, samples]) {
  weight @patches.weight: f32[4, 1, 8]
  weight @positions: f32[1, 4, 12]
  %conv1d: f32[batch, 4, (samples//8)] = aten.conv1d(%x, @patches.weight, None, [8])  # patches
  %add: f32[batch, 4, (samples//8)] = aten.add.Tensor(%conv1d, @positions)
  return [%add]
}
"""
BLOCKS = """\
program Blocks(x: f32[batch, sequence]) {
  %sym_size_int: int batch = aten.sym_size.int(%x, 0)
  %reshape: f32[batch, (sequence//20), (sequence//((sequence//20)))] = aten.reshape(%x, [%sym_size_int, -1, 20])
  return [%reshape]
}
"""
SPELLED = """\
program Spelled(x: f32[batch, sequence + 1]) {
  %reshape: f32[batch*sequence + batch] = aten.reshape(%x, [-1])
  %neg: f32[batch*sequence + batch] = aten.neg(%reshape)
  %sym_size_int: int batch*sequence + batch = aten.sym_size.int(%neg, 0)
  %truediv: float IntTrueDiv(batch*sequence + batch, 4) = operator.truediv(%sym_size_int, 4)
  return [%neg]
}
"""
EXPERTS = """\
program Experts(x: f32[tokens, 4], counts: i64[2]) {
  %unbind: (i64[], i64[]) = aten.unbind.int(%counts)
  %getitem: i64[] = operator.getitem(%unbind, 0)
  %getitem_1: i64[] = operator.getitem(%unbind, 1)
  %item: int u0 = aten.item(%getitem)
  %ge: bool u0 >= 0 = operator.ge(%item, 0)
  %_assert_scalar: none = aten._assert_scalar(%ge, 'a negative count')
  %item_1: int u1 = aten.item(%getitem_1)
  %ge_1: bool u1 >= 0 = operator.ge(%item_1, 0)
  %_assert_scalar_1: none = aten._assert_scalar(%ge_1, 'a negative count')
  %split_with_sizes: (f32[u0, 4], f32[u1, 4]) = aten.split_with_sizes(%x, [%item, %item_1])
  %getitem_2: f32[u0, 4] = operator.getitem(%split_with_sizes, 0)
  %getitem_3: f32[u1, 4] = operator.getitem(%split_with_sizes, 1)
  %cat: f32[u0 + u1, 4] = aten.cat([%getitem_2, %getitem_3])
  %chunk: (f32[u0 + u1, 2], f32[u0 + u1, 2]) = aten.chunk(%cat, 2, -1)
  %getitem_4: f32[u0 + u1, 2] = operator.getitem(%chunk, 0)
  %getitem_5: f32[u0 + u1, 2] = operator.getitem(%chunk, 1)
  %silu: f32[u0 + u1, 2] = aten.silu(%getitem_4)
  %mul: f32[u0 + u1, 2] = aten.mul.Tensor(%silu, %getitem_5)
  return [%mul]
}
"""
CHOICE = """\
program Choice(x: bool[batch]) {
  %_is_all_true: bool[] = aten._is_all_true(%x)
  %item: bool Eq(u0, 1) = aten.item(%_is_all_true)
  %sym_ite: int Piecewise((1, Eq(u0, 1)), (0, True)) = torch.sym_ite(%item, 1, 0)
  %ge: bool Piecewise((1, Eq(u0, 1)), (0, True)) >= 1 = operator.ge(%sym_ite, 1)
  %_assert_scalar: none = aten._assert_scalar(%ge, 'some are false')
  return [%x]
}
"""
NUMBERS = """\
program Numbers(x: c64[batch], name='a\\\\', other="it's") {
  %mul: c64[batch] = aten.mul.Tensor(%x, (1.5-2j))
  %mul_1: c64[batch] = aten.mul.Tensor(%mul, 2j)
  %mul_2: c64[batch] = aten.mul.Tensor(%mul_1, (nan+infj))
  %mul_3: c64[batch] = aten.mul.Tensor(%mul_2, -inf)
  return [%mul_3]
}
"""
LOWERED = "quantize{scheme=int4-weight}"


def after(name: str, passes: str, lower: bool = False) -> str:
    """The text of a captured program after passes, and lowered for the eager backend."""
    found = capture_of(name)
    chosen = parse_pipeline(passes, PASSES, RECIPES)
    lowering = Eager().lowering(torch.device("cpu")) if lower else ()
    return Pipeline([*chosen, *lowering], checks="off", data=[found.example]).run(found.program.copy())[0].text()


@pytest.mark.parametrize("name", CASES)
def test_a_captured_program_is_read_as_it_was_printed(name):
    text = captured(name).text()
    assert parse_program(text).text() == text


@pytest.mark.parametrize("passes", ["exact", "exact,cast", "exact,low-rank{rank=2}", "exact,sparsify-attention{window=2}"])
def test_so_is_one_after_passes(passes):
    text = after("llama", passes)
    assert parse_program(text).text() == text


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_so_is_one_with_kernels(name):
    text = after(name, f"exact,{LOWERED}", lower=True)
    assert parse_program(text).text() == text


@pytest.mark.slow
@pytest.mark.parametrize("entry", [*entries()], ids=lambda entry: entry.name)
def test_so_are_the_models_of_the_zoo(entry: Entry):
    case = entry.build()
    try:
        text = capture(case.model, case.args, case.kwargs).program.text()
    except LissomError as error:
        pytest.skip(str(error))
    assert parse_program(text).text() == text


TEXTS = [STEM, POSITIONS, BLOCKS, SPELLED, EXPERTS, CHOICE, NUMBERS]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[: text.index("(")])
def test_a_text_is_printed_as_it_was_read(text):
    assert parse_program(text).text() == text


def test_sizes_at_the_example_fit_the_operators():
    x = nodes.value(parse_program(STEM).placeholders[0])
    assert isinstance(x, torch.Tensor)
    assert fake.hint(x.shape[2]) == 260


def test_sizes_that_are_given_stay():
    with pytest.raises(ArtifactError, match="Kernel size can't be greater than actual input size"):
        parse_program(STEM, {"samples": 20})
    with pytest.raises(ArtifactError, match=r"must match the size of tensor b \(12\)"):
        parse_program(POSITIONS, {"samples": 32})
    assert parse_program(POSITIONS, {"samples": 96}).text() == POSITIONS


def test_an_input_may_have_the_name_of_a_builtin():
    text = capture(torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.randn(2, 4),), {}).program.text()
    assert "(input: f32" in text and "%input_1" in text
    assert parse_program(text).text() == text


def test_it_runs():
    program = parse_program(TWICE)
    x = torch.randn(3, 4)
    assert torch.equal(program(x), x @ program.weight("up.weight").T * 2)


def test_weights_depend_on_their_names_alone():
    first, second = (parse_program(TWICE).weight("up.weight") for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, parse_program(TWICE.replace("up.weight", "down.weight")).weight("down.weight"))


def test_passes_run_on_it():
    text = TWICE.replace("%mul: f32[batch, 4] = aten.mul.Tensor(%linear, 2.0)", "%mul: f32[batch, 4] = aten.clone(%linear)")
    program = parse_program(text, {"batch": 2})
    found, _ = Pipeline(
        parse_pipeline("remove-no-ops", PASSES, RECIPES), check_samples(program.signature, [torch.ones(2, 4)])
    ).run(program)
    assert found.text() == text.replace("  %mul: f32[batch, 4] = aten.clone(%linear)\n", "").replace("%mul]", "%linear]")


PARTS = {
    "unknown operator": ("aten.mul.Tensor", "aten.mull", "line 4, column 25 .* there is no operator 'aten.mull.default'"),
    "operator of Python": ("aten.mul.Tensor", "os.system", "there is no operator 'os.system.default'"),
    "another type": (
        "%mul: f32[batch, 4]",
        "%mul: f32[batch, 5]",
        r"line 4, column 9 .* aten.mul.Tensor returns f32\[batch, 4\] here, and not f32\[batch, 5\]",
    ),
    "unknown value": ("(%linear, 2.0)", "(%line, 2.0)", "line 4, column 41 .* there is no value '%line' above"),
    "unknown weight": ("(%x, @up.weight)", "(%x, @up.bias)", "there is no weight '@up.bias' above"),
    "unknown size": ("@up.weight: f32[4, 4]", "@up.weight: f32[4, tokens]", "no argument has the size 'tokens'"),
    "unknown dtype": ("(x: f32[", "(x: float32[", "line 1, column 18 .* there is no dtype 'float32'"),
    "wrong shapes": ("weight: f32[4, 4]", "weight: f32[4, 5]", "line 3, column 4 .* aten.linear refuses its arguments"),
    "a value twice": ("%mul: f32", "%linear: f32", "there is a value '%linear' already"),
    "wrong argument": ("2.0)", "'two')", "the argument 'other' of aten.mul.Tensor is 'two'"),
    "a slice of nothing": ("2.0)", "slice())", "line 4, column 50 .* a slice has one to three numbers, and not 0"),
    "another condition": (
        "%mul: f32[batch, 4] = aten.mul.Tensor(%linear, 2.0)",
        "%mul: int batch = aten.sym_size.int(%x, 0)\n  %ge: bool batch >= 3 = operator.ge(%mul, 4)",
        "operator.ge returns bool batch >= 4 here, and not bool batch >= 3",
    ),
    "a size divided by 0": ("f32[batch, 4]) {", "f32[batch//0, 4]) {", r"'batch//0' is not a size: .*division"),
    "a negative size": ("f32[batch, 4]) {", "f32[-batch, 4]) {", "'x' cannot be of its type: .* negative dimension"),
    "nested choices": (
        "weight: f32[4, 4]",
        "weight: f32[4, Piecewise((4, Eq(batch, Piecewise((4, Eq(batch, 1)), (2, True)))), (4, True))]",
        "has .* parts; the limit is 512",
    ),
    "deep lists": ("(%x, @up.weight)", "(" + "[" * 2000, "the text is nested too deeply"),
    "no end": ("\n}\n", "", "line 5, column 16 .* expected '}'"),
    "more behind": ("\n}\n", "\n}\nx", "expected the end of the text after the program"),
    "code in a size": ("[batch, 4]) {", "[__import__('os'), 4]) {", "is not a size"),
    "a size too large": ("(x: f32[batch, 4])", "(x: f32[batch**999, 4])", "may have .* bits"),
    "a weight that is a method": ("up.weight", "forward", "is not a name for a weight"),
    "a huge weight": ("f32[4, 4]", "f32[4, 99999999999999]", "the program's weights would take .* bytes of memory"),
    "random numbers": ("aten.mul.Tensor(%linear, 2.0)", "aten.dropout(%linear, 0.5, True)", "draws random numbers"),
    "a write": ("aten.mul.Tensor(%linear, 2.0)", "aten.copy_(%linear, %linear)", "writes to a buffer that is not state"),
}


@pytest.mark.parametrize(("part", "other", "told"), PARTS.values(), ids=PARTS)
def test_what_does_not_parse_is_told_with_its_place(part, other, told):
    with pytest.raises(ArtifactError, match=told):
        parse_program(TWICE.replace(part, other))


@pytest.mark.parametrize("text", ["", "\0", "program", "{" * 100_000])
def test_other_texts_are_no_programs(text):
    with pytest.raises(ArtifactError, match="of the program's text: expected"):
        parse_program(text)


def test_sizes_that_the_program_has_not_are_told():
    with pytest.raises(ArtifactError, match="the program has no size 'tokens'; its sizes: batch"):
        parse_program(TWICE, {"tokens": 3})
