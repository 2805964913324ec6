"""A compiled model in the place of one of transformers, and as a module."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.models.huggingface import find_directory
from tests.support.classifiers import TEXTS, minilm_tokenizer, text_classifier
from tests.support.models import feed_forward, normal, tiny_bert


@pytest.fixture(scope="module")
def bert():
    """A tiny encoder, and it compiled."""
    case = tiny_bert()
    return case, lissom.compile(case.model, case.inputs)


@pytest.fixture(scope="module")
def tokenizer():
    return minilm_tokenizer()


@pytest.fixture(scope="module")
def classifier(tokenizer):
    """A tiny classifier of three labels with random weights, and it compiled."""
    model = text_classifier(tokenizer, ["cooking", "astronomy", "music"], layers=2)
    return model, lissom.compile(model, tokenizer(TEXTS, padding=True, return_tensors="pt"))


def pipeline(task, model, tokenizer):
    return transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture
def complaints(monkeypatch):
    """What transformers logs as wrong meanwhile."""
    found = []
    monkeypatch.setattr(logging.getLogger("transformers.pipelines.base"), "error", found.append)
    return found


def test_a_pipeline_classifies_as_with_the_original(classifier, tokenizer, complaints):
    model, fast = classifier
    wanted = pipeline("text-classification", model, tokenizer)(TEXTS, top_k=3)
    found = pipeline("text-classification", fast, tokenizer)(TEXTS, top_k=3, batch_size=2)
    for left, right in zip(wanted, found, strict=True):
        assert [item["label"] for item in left] == [item["label"] for item in right]
        # Two layers of float32, unit roundoff 6e-8, with sums of at most 24 terms in another order.
        assert [item["score"] for item in right] == pytest.approx([item["score"] for item in left], rel=1e-5)
    assert complaints == []


def test_a_pipeline_extracts_features_as_with_the_original(classifier, tokenizer):
    model, fast = classifier
    wanted, found = (pipeline("feature-extraction", item, tokenizer)(TEXTS[0], return_tensors=True) for item in (model, fast))
    torch.testing.assert_close(found, wanted)


def test_a_pipeline_shows_the_model_it_has(classifier, tokenizer):
    model, fast = classifier
    assert repr(pipeline("text-classification", fast, tokenizer)) == repr(pipeline("text-classification", model, tokenizer))


def test_it_has_original_name_and_configuration(bert):
    case, fast = bert
    assert isinstance(fast, lissom.CompiledModel)
    assert type(fast).__name__ == "BertModel"
    assert fast.config.to_dict() == case.model.config.to_dict()
    assert fast.config is not case.model.config
    assert (fast.main_input_name, fast.can_generate()) == ("input_ids", False)
    assert list(inspect.signature(fast.forward).parameters) == list(case.inputs)


def test_what_the_model_says_of_itself_is_saved(classifier, tokenizer, tmp_path):
    _, fast = classifier
    fast.save(tmp_path / "model")
    again = lissom.load(tmp_path / "model")
    assert type(again.config) is transformers.BertConfig
    # As transformers does, it names the directory it was loaded from.
    assert again.config.to_dict() == fast.config.to_dict() | {"_name_or_path": str(tmp_path / "model")}
    assert pipeline("text-classification", again, tokenizer)(TEXTS) == pipeline("text-classification", fast, tokenizer)(TEXTS)


def test_other_models_have_no_configuration():
    fast = lissom.compile(feed_forward().model, normal(2, 5, 8))
    assert type(fast) is lissom.CompiledModel
    assert not hasattr(fast, "config")
    assert not hasattr(fast, "main_input_name")
    assert (fast.device, fast.dtype) == (torch.device("cpu"), torch.float32)


def test_arguments_asking_for_default_outputs_are_taken(bert):
    case, fast = bert
    plain = fast(**case.inputs)
    asked = fast(**case.inputs, return_dict=True, output_attentions=False, output_hidden_states=None, use_cache=False)
    assert torch.equal(plain.last_hidden_state, asked.last_hidden_state)


@pytest.mark.parametrize(("name", "value"), [("return_dict", False), ("output_attentions", True), ("use_cache", True)])
def test_arguments_that_ask_for_something_else_are_refused(bert, name, value):
    case, fast = bert
    with pytest.raises(InputError) as caught:
        fast(**case.inputs, **{name: value})
    other = f"compile again with {name}={value} among the example inputs"
    if name == "use_cache":
        other = "for generation compile with lissom.compile_generation"
    assert str(caught.value) == (
        f"argument '{name}' is {value}, and the program was captured with {not value}: pass {not value}, or {other}"
    )


def test_outputs_that_were_captured_may_be_asked_for(bert):
    case, _ = bert
    fast = lissom.compile(case.model, case.inputs | {"output_hidden_states": True})
    found = fast(**case.inputs, output_hidden_states=True)
    assert len(found.hidden_states) == 3


def test_it_stays_where_it_was_compiled_for(bert):
    _, fast = bert
    assert fast.to("cpu") is fast.cpu().float().eval() is fast
    around = nn.Sequential(fast)
    for move in (fast.to, around.to):
        with pytest.raises(UnsupportedError) as caught:
            move("meta")
        assert str(caught.value) == (
            "BertModel was compiled for cpu and cannot move to meta; compile it with device='meta', "
            "or keep what runs it on cpu (for a pipeline: device='cpu')"
        )
    with pytest.raises(UnsupportedError, match=r"BertModel is compiled and cannot be turned into torch\.float16;"):
        around.half()


def test_it_cannot_train(bert):
    _, fast = bert
    assert not fast.training
    with pytest.raises(UnsupportedError, match="BertModel is compiled for inference and cannot train"):
        nn.Sequential(fast).train()


def test_it_has_nothing_to_train(bert):
    _, fast = bert
    assert list(fast.parameters()) == []
    assert fast.num_parameters(only_trainable=True) == 0
    with pytest.raises(UnsupportedError, match="is compiled for inference and cannot train"):
        fast.train()


def test_its_weights_are_counted_and_listed(bert):
    case, fast = bert
    weights = fast.program.weights()
    assert fast.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in fast.state_dict().items())
    assert nn.Sequential(fast).state_dict().keys() == {f"0.{name}" for name in weights}
    tables = sum(module.weight.numel() for module in case.model.modules() if isinstance(module, nn.Embedding))
    # Packing pads rows of this small model, and buffers such as positions count too.
    assert case.model.num_parameters() <= fast.num_parameters() < case.model.num_parameters() * 2
    assert fast.num_parameters(exclude_embeddings=True) <= fast.num_parameters() - tables
    assert fast.get_memory_footprint() == sum(weight.nbytes for weight in weights.values())
    assert fast.get_memory_footprint(return_buffers=False) == fast.get_memory_footprint()


def test_its_weights_cannot_be_exchanged(bert):
    _, fast = bert
    fast.load_state_dict(fast.state_dict())
    others = {name: tensor + 1 for name, tensor in fast.state_dict().items()}
    for module, given in ((fast, others), (nn.Sequential(fast), {f"0.{name}": tensor for name, tensor in others.items()})):
        with pytest.raises(UnsupportedError, match="is compiled, and its weights cannot be exchanged"):
            module.load_state_dict(given)


def test_it_is_pickled_and_copied_through_its_artifact(classifier, tokenizer):
    _, fast = classifier
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for again in (pickle.loads(pickle.dumps(fast)), copy.deepcopy(fast), copy.deepcopy(nn.Sequential(fast))[0]):
        assert type(again).__name__ == "BertForSequenceClassification"
        assert torch.equal(again(**inputs).logits, fast(**inputs).logits)
        assert again.config.to_dict() == fast.config.to_dict()


@pytest.mark.slow
def test_trainer_and_accelerate_evaluate_it(classifier, tokenizer, tmp_path):
    model, _ = classifier
    inputs = dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    fast = lissom.compile(model, inputs | {"labels": torch.tensor([0, 1])}, checks="structural")
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    assert accelerate.Accelerator(cpu=True).prepare(fast) is fast
    rows = [{name: value[row] for name, value in inputs.items()} | {"labels": torch.tensor(row)} for row in (0, 1, 1)]
    options = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=2)
    wanted, found = (transformers.Trainer(model=one, args=options, eval_dataset=rows).evaluate() for one in (model, fast))
    assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)


def test_it_is_not_compiled_again(bert):
    case, fast = bert
    with pytest.raises(CaptureError, match="BertModel is compiled already; compile the model it was made from"):
        lissom.compile(fast, case.inputs)


def test_sentence_transformers_encode_as_with_the_original(minilm):
    package = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers: pip install 'lissom[examples]'")
    encoder = package.SentenceTransformer(str(find_directory("minilm")), device="cpu")
    wanted = encoder.encode(TEXTS, convert_to_tensor=True)
    encoder[0].model = lissom.compile(encoder[0].model, minilm.example_inputs)
    # Six layers of float32 that sum 384 and 1536 terms in another order, and a norm.
    torch.testing.assert_close(encoder.encode(TEXTS, convert_to_tensor=True), wanted, rtol=1e-4, atol=1e-5)
    assert encoder.device == torch.device("cpu")
