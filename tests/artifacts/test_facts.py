"""Tests of lissom.artifacts.facts: the metadata of a model, as an artifact holds it."""

import pytest
import transformers

from lissom.artifacts.facts import Facts
from lissom.errors import ArtifactError


def test_configuration_no_library_knows_is_read_as_plain_one():
    facts = Facts.from_json({"config": {"model_type": "of my own", "width": 3}, "main_input": "x", "modalities": ["text"]})
    assert type(facts.make_config()) is transformers.PretrainedConfig
    assert facts.make_config().width == 3


def test_facts_that_are_none_are_refused():
    with pytest.raises(ArtifactError, match=r"there is no field 'main_input' in .*; save the model again"):
        Facts.from_json({"config": {}})


def test_a_configuration_transformers_refuses_is_named():
    facts = Facts.from_json({"config": {"model_type": "bert", "hidden_size": "wide"}, "main_input": "x", "modalities": []})
    with pytest.raises(ArtifactError, match="transformers refuses the configuration of this model of type 'bert'"):
        _ = facts.make_config()
