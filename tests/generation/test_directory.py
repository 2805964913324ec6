"""Tests of decoders in directories: as whole as models, and every file with its hash."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import lissom
from lissom.artifacts import artifact
from lissom.artifacts.directory import sign_directory
from lissom.artifacts.manifest import NAME, Content, read_manifest
from lissom.errors import ArtifactError
from lissom.generation.directory import CONFIG, GENERATION, is_saved
from lissom.generation.saved import configuration_of
from tests.artifacts.test_directory import rewrite
from tests.artifacts.test_signature import write_keys
from tests.support.decoders import DECODERS, decoder, prompt
from tests.support.killing import contents
from tests.support.saving import compiled

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
UNUSED = ("torchao", "tensorflow", "scipy", "sklearn", "onnxruntime", "openvino", "transformers.modeling_utils")
OWN = {NAME, "program.json", "steps.json", "weights.safetensors"}


@pytest.fixture(scope="module")
def fast():
    return lissom.compile_generation(decoder("llama"), max_length=32, checks="off")


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{index}": index for index in range(99)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=made)
    found.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    return found


@pytest.fixture(scope="module")
def original(fast, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "saved"
    fast.save(path, tokenizer)
    return path


@pytest.fixture
def saved(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "here" / "saved"))


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(ArtifactError) as caught:
        lissom.load_generation(path, **options)
    return str(caught.value).replace(str(path), "DIR")


def test_tokenizer_file_has_no_indents(saved, tokenizer):
    text = (saved / "tokenizer.json").read_text()
    assert "\n" not in text and json.loads(text) == json.loads(tokenizer.backend_tokenizer.to_str())
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors"}
    assert AutoTokenizer.from_pretrained(saved)("w5 w1").input_ids == tokenizer("w5 w1").input_ids


def test_decoder_is_loaded_without_models_of_transformers(saved):
    code = f"""
import sys, lissom
from lissom.generation.prompted import load_prompted
decoder, _, ids = load_prompted({str(saved)!r}, "w5 w1", None)
decoder.step(ids)
print(sorted({{"transformers.generation.utils", *{UNUSED}}} & sys.modules.keys()))
lissom.load_generation({str(saved)!r})
print(sorted({{*{UNUSED}}} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n[]\n" and not ran.stderr


def test_every_file_has_its_hash(saved):
    files = read_manifest(saved / NAME).files
    assert {*files} | {NAME} == {path.name for path in saved.iterdir()}
    assert {CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json"} < {*files}
    assert all(content == Content.of(saved / name) for name, content in files.items())
    assert is_saved(saved)


def test_it_comes_back_with_its_tokenizer(fast, tokenizer, saved):
    again = lissom.load_generation(saved)
    assert again.config.to_dict() == fast.config.to_dict() | {"_name_or_path": str(saved)}
    assert AutoConfig.from_pretrained(saved).vocab_size == fast.config.vocab_size
    assert again.generation_config.to_dict() == GenerationConfig.from_pretrained(saved).to_dict()
    assert torch.equal(again.generate(**prompt(), **GREEDY), fast.generate(**prompt(), **GREEDY))
    assert AutoTokenizer.from_pretrained(saved).chat_template == tokenizer.chat_template
    # The program is an artifact's like any other.
    assert lissom.load(saved).program.text() == again.program.text()


@pytest.mark.parametrize(
    ("name", "field", "value"), [(CONFIG, "vocab_size", 7), (CONFIG, "eos_token_id", 3), (GENERATION, "eos_token_id", 3)]
)
def test_a_changed_configuration_is_refused(saved, name, field, value):
    fields = json.loads((saved / name).read_text()) | {field: value}
    (saved / name).write_text(json.dumps(fields))
    assert f"DIR/{name}' " in refusal(saved)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_every_damaged_file_is_refused(saved, damage):
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            half = len(whole) // 2
            path.write_bytes(whole[:half] + (bytes([whole[half] ^ 1]) + whole[half + 1 :] if damage == "flip" else b""))
        assert refusal(saved)
        path.write_bytes(whole)
    assert lissom.load_generation(saved).length == 0


def test_decoder_saved_without_hashes_is_refused_with_remedy(saved, tmp_path):
    former = tmp_path / "former"
    (former / "program").mkdir(parents=True)
    compiled("tied").save(former / "program")
    shutil.copy(saved / CONFIG, former)
    assert refusal(former) == (
        "'DIR' was saved by an earlier Lissom, without hashes of its configuration; "
        "compile the model again with lissom.compile_generation, and save it to another directory"
    )


def test_a_model_that_is_no_decoder_is_refused(tmp_path):
    compiled("tied").save(tmp_path / "model")
    assert refusal(tmp_path / "model") == "'DIR' holds no saved decoder; name a directory that its save wrote"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "[] is not a table"),
        ("{}", "there is no model of type None"),
        ('{"model_type": ["llama"]}', "there is no model of type ['llama']"),
        ('{"model_type": "no-such"}', "there is no model of type 'no-such'"),
        ('{"model_type": "llama", "hidden_act": [[]]}', "Validation error for field 'hidden_act'"),
        ("{", "holds no JSON that can be read"),
    ],
)
def test_a_configuration_transformers_cannot_read_is_refused(saved, content, said):
    (saved / CONFIG).write_text(content)
    rewrite(saved, files={**read_manifest(saved / NAME).files, CONFIG: Content.of(saved / CONFIG)})
    assert f"DIR/{CONFIG}' holds " in refusal(saved) and said in refusal(saved)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("place", ["save_weights", "_confirm", "write_manifest"])
def test_a_save_that_fails_leaves_what_was_there(fast, tokenizer, saved, place, error, before, monkeypatch):
    def fail(*_, **__):
        raise error

    if not before:
        shutil.rmtree(saved)
    was = contents(saved) if before else None
    monkeypatch.setattr(artifact, place, fail)
    with pytest.raises((KeyboardInterrupt, ArtifactError)):
        fast.save(saved, tokenizer)
    assert [path.name for path in saved.parent.iterdir()] == (["saved"] if before else [])
    assert was is None or contents(saved) == was


def test_tokenizer_that_cannot_be_saved_leaves_what_was_there(fast, saved, monkeypatch):
    class Broken(PreTrainedTokenizerFast):
        def save_pretrained(self, *_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

    was = contents(saved)
    broken = Broken(tokenizer_object=Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0")))
    with pytest.raises(ArtifactError, match="No space left on device; what was there before is unchanged"):
        fast.save(saved, broken)
    assert contents(saved) == was and [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_decoder_is_signed_whole(saved, tmp_path):
    private, public = write_keys(tmp_path, "mine")
    sign_directory(saved, private)
    assert lissom.load_generation(saved, trusted_keys=[public]).length == 0
    (saved / GENERATION).write_text("{}")
    rewrite(saved, files={**read_manifest(saved / NAME).files, GENERATION: Content.of(saved / GENERATION)})
    assert lissom.load_generation(saved).length == 0
    assert refusal(saved, trusted_keys=[public]).startswith("'DIR' is not signed by a trusted key (")


@pytest.mark.parametrize("name", DECODERS)
def test_configurations_are_read_as_transformers_reads_them(name, tmp_path):
    decoder(name).config.to_json_file(tmp_path / CONFIG, use_diff=False)
    found = configuration_of(json.loads((tmp_path / CONFIG).read_text()))
    wanted = AutoConfig.from_pretrained(tmp_path)
    found._name_or_path = wanted._name_or_path
    assert type(found) is type(wanted) and found.to_dict() == wanted.to_dict()
