"""Tests of lissom.driver.keywords: functions whose keywords are the fields of a dataclass."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

import lissom
from lissom.driver.options import Settings

MODEL, X = torch.nn.Linear(2, 2), torch.ones(1, 2)


def test_a_signature_has_all_keywords_with_their_defaults():
    keywords = [item for item in inspect.signature(lissom.compile).parameters.values() if item.kind is item.KEYWORD_ONLY]
    assert {item.name: item.default for item in keywords} == {item.name: item.default for item in fields(Settings)}


def test_required_keywords_come_first():
    assert list(inspect.signature(lissom.tune_generation).parameters)[:4] == ["model", "max_length", "data", "max_drop"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: lissom.compile(MODEL, X, pases=""), "compile() got an unexpected keyword argument 'pases'"),
        (lambda: lissom.compile(MODEL, X, settings=None), "compile() got an unexpected keyword argument 'settings'"),
        (lambda: lissom.optimize(MODEL, X, backend="eager"), "optimize() got an unexpected keyword argument 'backend'"),
        (lambda: lissom.optimize(MODEL), "optimize() missing a required argument: 'example_inputs'"),
        (lambda: lissom.compile(MODEL, X, "exact"), "compile() too many positional arguments"),
        (lambda: lissom.compile_generation(MODEL), "compile_generation() missing a required argument: 'max_length'"),
    ],
)
def test_a_wrong_call_is_one_sentence(call, sentence):
    with pytest.raises(TypeError) as refused:
        call()
    assert str(refused.value) == sentence
