"""Tests of tools.zoo.pages: the check finds what a fold or a picture hides."""

from __future__ import annotations

import pytest

from lissom.inspect.lines import Line
from lissom.inspect.svg.program import program_svg
from tests.support import captures
from tests.support.models import tiny_bert
from tools.zoo.pages import _anonymous, hidden_by_folds, hidden_in_picture


@pytest.fixture(scope="module")
def text() -> str:
    case = tiny_bert()
    return captures.optimize(case.model, case.inputs, checks="structural").program.text()


def lines(text: str) -> list[Line]:
    return [Line.of(item) for item in text.split("\n")]


def test_a_program_whose_layers_are_equal_hides_nothing(text):
    assert hidden_by_folds(lines(text)) == [] and hidden_in_picture(text, program_svg(text, "Bert")) == []


def test_layers_with_different_constant_or_input_are_distinct(text):
    types = {line.defines: line.type for line in lines(text) if line.defines}

    def layer(text: str, number: int) -> list[str]:
        path = f"encoder.layer.{number}"
        return _anonymous([line for line in lines(text) if line.path.startswith(f"{path}.")], path, types)

    assert layer(text, 0) == layer(text, 1)
    place = next(line for line in text.split("\n") if "aten.layer_norm(" in line and "encoder.layer.1." in line)
    assert "1e-12" in place and layer(text.replace(place, place.replace("1e-12", "1e-06")), 1) != layer(text, 0)


def test_what_a_picture_leaves_out_is_found(text):
    picture = program_svg(text, "Bert")
    without = picture.replace("<title>%softmax", "<title>%other").replace("<title>%scaled_dot", "<title>%other_dot")
    assert any("is not drawn" in sentence for sentence in hidden_in_picture(text, without))
    assert any(
        "is drawn 2 times" in sentence for sentence in hidden_in_picture(text, picture.replace("%linear_1:", "%linear:"))
    )
