"""Tests of lissom.artifacts.nesting: containers come back, those of transformers too."""

import copy
import json
import pickle
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass

import pytest
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from lissom.artifacts import nesting
from lissom.artifacts.nesting import Output, decode_nesting, encode_nesting
from lissom.errors import ArtifactError

Pair = namedtuple("Pair", "left right")


def again(tree: object, values: list[object]) -> object:
    """The values in the tree's nesting after it went through JSON."""
    spec = pytree.tree_structure(tree)
    return pytree.tree_unflatten(values, decode_nesting(json.loads(json.dumps(encode_nesting(spec, "it")))))


@pytest.mark.parametrize(
    "tree",
    [
        *(1, [], (), {}, [1], (1, [2, (3,)]), {"b": 1, "a": (2, None)}, {1: 2, None: 3}),
        *(
            OrderedDict(z=1, a=[2]),
            BaseModelOutput(last_hidden_state=1),
            [BaseModelOutput(last_hidden_state=1, attentions=(2, 3))],
        ),
    ],
    ids=repr,
)
def test_a_nesting_comes_back(tree):
    found = again(tree, pytree.tree_leaves(tree))
    assert found == tree
    assert type(found) is type(tree)
    spec = pytree.tree_structure(tree)
    assert decode_nesting(encode_nesting(spec, "it")) == spec


def test_named_tuple_comes_back_as_one_of_that_name():
    found = again(Pair(1, [2, 3]), [1, 2, 3])
    assert found == (1, [2, 3])
    assert (type(found).__name__, found.left, found.right) == ("Pair", 1, [2, 3])


@pytest.mark.parametrize("tree", [deque([1])], ids=repr)
def test_another_container_is_refused(tree):
    with pytest.raises(ArtifactError) as caught:
        encode_nesting(pytree.tree_structure([tree]), "what the model returns")
    assert str(caught.value) == (
        "what the model returns holds a value of type 'deque', which an artifact cannot hold; "
        "it holds lists, tuples, dicts and outputs of transformers"
    )


@dataclass
class Answer(ModelOutput):
    """An output of a model of its own."""

    score: object = None
    extra: object = None


def test_output_class_of_model_is_found_in_loaded_module():
    assert type(again(Answer(score=1), [1])) is Answer


def test_output_whose_module_is_not_loaded_is_made_anew():
    data = {"output": "Answer", "module": "a.model.nobody.has", "fields": ["score", "extra"], "items": [["score", "*"]]}
    found = pytree.tree_unflatten([1], decode_nesting(data))
    assert isinstance(found, ModelOutput)
    assert (type(found).__name__, found.score, found["score"], found[0], found.extra) == ("Answer", 1, 1, 1, None)


@pytest.fixture
def without_transformers(monkeypatch):
    monkeypatch.setattr(nesting, "_output_class", lambda *_: None)


def test_without_transformers_an_output_is_like_one(without_transformers):
    found = again(BaseModelOutput(last_hidden_state=1, attentions=(2, 3)), [1, 2, 3])
    assert isinstance(found, Output)
    assert (found.last_hidden_state, found["attentions"], found[0], found[:], found.hidden_states) == (
        1,
        (2, 3),
        1,
        (1, (2, 3)),
        None,
    )
    assert list(found) == ["last_hidden_state", "attentions"]
    assert found.to_tuple() == (1, (2, 3))
    assert repr(found) == "BaseModelOutput(last_hidden_state=1, attentions=(2, 3))"
    with pytest.raises(AttributeError, match="BaseModelOutput has no field 'logits'; it has last_hidden_state, "):
        _ = found.logits
    with pytest.raises(AttributeError):
        pickle.dumps(found.__getstate_nothing__)
    # Saved again, it is what it was.
    assert again(found, [1, 2, 3]) == found


def test_an_output_is_copied_and_pickled():
    found = Output("BaseModelOutput", ("last_hidden_state", "attentions"), {"last_hidden_state": 1})
    for other in (copy.copy(found), copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other == found and repr(other) == repr(found)


@pytest.mark.parametrize(
    "data",
    [
        None,
        1,
        "x",
        {"set": []},
        {"list": 3},
        {"dict": ["*"]},
        {"namedtuple": "a b", "items": []},
        {"namedtuple": "A", "items": [["class", "*"]]},
        {"dict": [["a", "*"], ["a", "*"]]},
        {"dict": [[["a"], "*"]]},
        {"OrderedDict": [[1, "*"], [True, "*"]]},
        {"output": "A", "module": "b", "fields": ["a"], "items": [["a", "*"], ["a", "*"]]},
    ],
    ids=str,
)
def test_what_is_no_nesting_is_refused(data):
    with pytest.raises(ValueError, match=r"is not |is no |are not keys|valid identifiers|keyword"):
        decode_nesting(data)
