"""Tests of lissom.artifacts.program_text: the inverse of the printer."""

from __future__ import annotations

import pytest
import torch

from lissom.artifacts.program_text import parse_program
from lissom.backends.eager.backend import Eager
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
