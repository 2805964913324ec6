"""Tests of lissom.cli.bench.workload: shapes, the text in them, and how answers are compared."""

import numpy as np
import pytest
import torch

from lissom.cli.bench.workload import (
    Shape,
    answer,
    cosine,
    load_model,
    make_inputs,
    parse_shapes,
    prepare,
    read_inputs,
    read_wanted,
)
from lissom.errors import UnsupportedError
from tests.frontends.models.test_huggingface import directory  # noqa: F401

TEXTS = ["one two three", "four", "five six seven eight nine"]


@pytest.fixture(scope="module")
def model(directory):  # noqa: F811
    return load_model(str(directory))


def test_shapes_are_read_and_printed_alike():
    assert parse_shapes("1x32, 8x128,32xragged") == (Shape(1, 32), Shape(8, 128), Shape(32, None))
    assert [str(shape) for shape in parse_shapes("1x32,8xragged,8")] == ["1x32", "8xragged", "8"]


def test_a_shape_given_twice_is_measured_once():
    assert parse_shapes("1x32,1x32") == (Shape(1, 32),)


@pytest.mark.parametrize("text", ["", "0", "8x", "0x8", "8x-1", "8x128x2", "8xrugged"])
def test_what_is_no_shape_is_refused(text):
    with pytest.raises(UnsupportedError) as caught:
        parse_shapes(text)
    assert str(caught.value) == f"'{text}' is not a shape; write rows x tokens, for example 1x32,8x128,32xragged"


def test_rows_of_a_length_are_full_of_different_text(model):
    inputs = make_inputs(model, [Shape(3, 9)], TEXTS)["3x9"]
    assert inputs["input_ids"].shape == (3, 9)
    assert bool(inputs["attention_mask"].all())
    assert len({tuple(row) for row in inputs["input_ids"].tolist()}) == 3


def test_ragged_rows_are_padded_to_the_longest(model):
    inputs = make_inputs(model, [Shape(3, None)], TEXTS)["3xragged"]
    assert inputs["attention_mask"].sum(1).tolist() == [5, 3, 7]


def test_model_without_text_is_measured_at_its_example():
    pytest.importorskip("timm")
    pictures = load_model("timm:vit_tiny_patch16_224")
    assert list(make_inputs(pictures, None, None)) == ["example"]
    rows = make_inputs(pictures, parse_shapes("1,5"), None)
    assert {name: next(iter(item.values())).shape[0] for name, item in rows.items()} == {"1": 1, "5": 5}
    with pytest.raises(UnsupportedError, match="has no tokenizer to fill a shape with text; give numbers of rows, such as 1,8"):
        make_inputs(pictures, [Shape(1, 8)], None)


def test_text_needs_a_number_of_tokens(model):
    with pytest.raises(UnsupportedError, match="reads text; write rows x tokens, for example 1x32,1x128,8x128"):
        make_inputs(model, parse_shapes("1,8"), None)


def test_a_workload_holds_inputs_answers_and_calibration(model, tmp_path):
    work = prepare(model, [Shape(2, 6), Shape(2, None)], TEXTS, tmp_path)
    assert list(work.shapes) == ["2x6", "2xragged"]
    assert len(work.calibration) == len(TEXTS)
    inputs = read_inputs(work.shapes["2x6"])
    with torch.inference_mode():
        wanted = model(inputs).last_hidden_state
    np.testing.assert_array_equal(read_wanted(work.shapes["2x6"]), wanted.numpy())


def test_shape_model_does_not_run_at_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"does not run at 1x4000: \S"):
        prepare(model, [Shape(1, 4000)], None, tmp_path)


def test_the_answer_is_the_first_floating_point_output():
    logits = torch.ones(2, 3, dtype=torch.bfloat16)
    assert answer((torch.ones(2, dtype=torch.long), {"logits": logits})).dtype == np.float32
    assert answer([np.zeros(3, np.float32)]).shape == (3,)
    with pytest.raises(UnsupportedError, match="no floating-point tensor"):
        answer(torch.ones(2, dtype=torch.long))


def test_only_real_tokens_are_compared():
    wanted = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    found = wanted.copy()
    found[1, 2] = -100.0
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    assert cosine(found, wanted, mask) == pytest.approx(1.0)
    assert cosine(found, wanted, None) < 0.5


def test_answers_of_other_shapes_are_refused():
    with pytest.raises(UnsupportedError) as caught:
        cosine(np.zeros((2, 3)), np.zeros((2, 4)), None)
    assert str(caught.value) == "the answer has shape [2, 3]; PyTorch's has [2, 4]"
