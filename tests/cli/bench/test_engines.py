"""Tests of lissom.cli.bench.engines: every engine installed here answers like PyTorch, on a small encoder."""

import pytest
import torch

from lissom.cli.bench.engines import ENGINES, Engine, Task, eager, find_engines
from lissom.cli.bench.workload import Shape, answer, cosine, encode, load_model
from lissom.errors import UnsupportedError
from tests.frontends.models.test_huggingface import directory  # noqa: F401

TEXTS = ["A lake.", "The lake lies still this morning, and nobody is on it.", "Who is there?"]
COMPILED = [name for name in ENGINES if name.startswith(("torch", "lissom-"))]
"""Engines that take more than a few seconds."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in COMPILED)) for name in ENGINES])
def test_an_engine_answers_like_pytorch(name, directory, tmp_path):  # noqa: F811
    engine = ENGINES[name]
    if engine.missing:
        pytest.skip(engine.missing)
    model = load_model(str(directory))
    inputs = encode(model, Shape(3, None), TEXTS)
    with torch.inference_mode():
        wanted = answer(model(inputs)).copy()
    build = engine.prepare(Task(model, [encode(model, Shape(1, None), [text]) for text in TEXTS], 1, tmp_path))
    mask = inputs["attention_mask"].numpy()
    # Eight bits keep about two digits; of random weights, whose answers are small sums of large terms, one.
    assert cosine(answer(build(inputs)()), wanted, mask) > (0.9 if "int8" in name else 0.999)
    shorter = encode(model, Shape(1, 5), TEXTS)
    assert answer(build(shorter)()).shape == (1, 5, 16)


def test_a_missing_package_is_named_with_what_to_do():
    engine = Engine("x", "X", ("torch", "no_such_package", "nor_this"), eager)
    assert engine.missing == "needs no_such_package and nor_this: pip install 'lissom[bench]'"
    assert ENGINES["eager"].missing is None


def test_engines_are_found_by_name_in_order_of_table():
    assert [engine.name for engine in find_engines("lissom, eager")] == ["eager", "lissom"]


def test_a_misspelt_engine_is_refused():
    with pytest.raises(
        UnsupportedError, match=r"there is no engine 'egaer'; did you mean 'eager'\? choose eager, torch-compile"
    ):
        find_engines("egaer")


def test_nncf_without_texts_says_so(directory, tmp_path):  # noqa: F811
    engine = ENGINES["openvino-int8"]
    if engine.missing:
        pytest.skip(engine.missing)
    with pytest.raises(UnsupportedError, match="it calibrates on texts; give some with --texts"), pytest.warns():
        engine.prepare(Task(load_model(str(directory)), [], 1, tmp_path))
