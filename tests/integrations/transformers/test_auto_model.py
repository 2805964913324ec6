"""Folders of saved models in transformers: Auto classes, pipelines, processors, the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, pipeline
from transformers.cli.serving.model_manager import ModelManager

import lissom
from lissom.artifacts.directory import is_artifact
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.models.huggingface import find_directory
from lissom.integrations.transformers.auto_model import SavedModel, register_config
from tests.frontends.capture.test_kv_cache import SIZES, llama
from tests.support.classifiers import TEXTS, minilm_tokenizer, text_classifier
from tests.support.hostile import seal
from tests.support.models import seeded, tokens
from tests.support.saving import in_a_fresh_process

LABELS = {0: "cooking", 1: "astronomy"}


@pytest.fixture(scope="module")
def tokenizer():
    return minilm_tokenizer()


@pytest.fixture(scope="module")
def classifier(tokenizer):
    return text_classifier(tokenizer, list(LABELS.values()), layers=1)


@pytest.fixture(scope="module")
def folder(classifier, tokenizer, tmp_path_factory) -> Path:
    fast = lissom.compile(classifier, tokenizer(TEXTS, padding=True, return_tensors="pt"), checks="structural")
    target = tmp_path_factory.mktemp("saved") / "model"
    fast.save(target, tokenizer=tokenizer)
    return target


def test_a_pipeline_takes_the_folder(classifier, tokenizer, folder):
    wanted = pipeline("text-classification", model=classifier, tokenizer=tokenizer, device="cpu")(TEXTS)
    found = pipeline("text-classification", model=str(folder), device="cpu")(TEXTS)
    assert [item["label"] for item in found] == [item["label"] for item in wanted]
    assert [item["score"] for item in found] == pytest.approx([item["score"] for item in wanted], rel=1e-5)


def test_an_auto_class_takes_the_folder(folder):
    found = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto", device_map="cpu")
    assert isinstance(found, lissom.CompiledModel)
    assert type(found.config) is transformers.BertConfig and found.config.id2label == LABELS


@pytest.mark.multiprocess
def test_transformers_may_be_imported_first_or_last(folder):
    load = f"print(type(transformers.AutoModelForSequenceClassification.from_pretrained({str(folder)!r})).__name__)"
    for imports in ("import transformers, lissom", "import lissom, transformers", "import transformers.models.auto, lissom"):
        assert in_a_fresh_process(f"{imports}\nimport transformers\n{load}").strip() == "BertForSequenceClassification"


def test_other_kinds_dtypes_and_devices_are_refused(folder):
    said = "holds a model of class BertForSequenceClassification, and AutoModelForTokenClassification loads models of other"
    with pytest.raises(InputError, match=said):
        transformers.AutoModelForTokenClassification.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match=r"was compiled for torch.float32, and dtype= is torch.float16"):
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float16)
    with pytest.raises(UnsupportedError, match=r"was compiled for torch.float32, and dtype= is float16"):
        AutoModelForSequenceClassification.from_pretrained(folder, dtype="float16")
    with pytest.raises(UnsupportedError, match="holds a compiled model, which takes no quantization_config="):
        AutoModelForSequenceClassification.from_pretrained(folder, quantization_config={"load_in_8bit": True})
    with pytest.raises(UnsupportedError, match="a compiled model runs on one device"):
        AutoModelForSequenceClassification.from_pretrained(folder, device_map={"a": "cpu", "b": 0})


@pytest.mark.parametrize("device_map", [-1, {"": -1}, {"a": []}, {"a": {}, "b": {}}, {}], ids=repr)
def test_no_device_is_refused_before_a_download(device_map):
    with pytest.raises(UnsupportedError, match=r"^device_map= is .*, and a compiled model runs on one device; give that one$"):
        SavedModel.from_pretrained("some/model", device_map=device_map)


def test_a_repository_that_cannot_be_reached(classifier, tokenizer, folder):
    with pytest.raises(
        ArtifactError, match=r"cannot be uploaded to 'some/model': .*; check the name, the token and the network"
    ):
        lissom.load(folder).push_to_hub("some/model")
    with pytest.raises(ArtifactError, match="'some/model' is no directory, and cannot be read from the Hub: "):
        SavedModel.from_pretrained("some/model")


def test_a_repository_in_the_cache_of_the_hub(folder, tmp_path):
    """The cache has links to files under their hashes, and files that the Hub adds. Several threads load it at once."""
    repo, commit = tmp_path / "models--some--model", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot, blobs = repo / "snapshots" / commit, repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for index, path in enumerate(folder.iterdir()):
        shutil.copyfile(path, blobs / str(index))
        (snapshot / path.name).symlink_to(blobs / str(index))
    (snapshot / "README.md").write_text("what the Hub adds")

    def load(_: int) -> str:
        return type(SavedModel.from_pretrained("some/model", cache_dir=str(tmp_path), local_files_only=True)).__name__

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(load, range(8))) == {"BertForSequenceClassification"}
    assert [path.name for path in (repo / "lissom").iterdir()] == [commit]


@pytest.mark.slow
def test_processors_are_kept_from_where_the_model_came(tokenizer, tmp_path):
    model = transformers.AutoModel.from_pretrained(find_directory("minilm")).eval()
    fast = lissom.compile(model, tokenizer(TEXTS, padding=True, return_tensors="pt"), checks="off")
    fast.save(tmp_path / "one")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "one")("a text").input_ids[0] == 101
    lissom.load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (tmp_path / "one" / "tokenizer.json").read_bytes()
    assert pipeline("feature-extraction", model=str(tmp_path / "two"), device="cpu")("a text")


def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer, tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    fast = lissom.compile(seeded(lambda: transformers.BertModel(config)), {"input_ids": tokens(2, 6) % 50}, checks="off")
    with pytest.raises(InputError, match=rf"the tokenizer has {len(tokenizer)} tokens, and BertModel has embeddings for 50"):
        fast.save(tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(InputError, match="processor= is 3; give one of transformers, which has save_pretrained"):
        fast.save(tmp_path / "model", processor=3)  # pyright: ignore[reportArgumentType]
    assert not is_artifact(tmp_path / "model")


@pytest.mark.slow
def test_a_vision_pipeline_takes_the_folder(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        id2label=LABELS,
    )  # fmt: skip
    model = seeded(lambda: transformers.ViTForImageClassification(config))
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    picture = torch.rand(16, 16, 3).mul(255).to(torch.uint8).numpy()
    image = pytest.importorskip("PIL.Image", reason="needs Pillow").fromarray(picture)
    fast = lissom.compile(model, dict(processor(image, return_tensors="pt")), checks="structural")
    fast.save(tmp_path / "model", processor=processor)
    wanted = pipeline("image-classification", model=model, image_processor=processor, device="cpu")(image)
    found = pipeline("image-classification", model=str(tmp_path / "model"), device="cpu")(image)
    assert [item["label"] for item in found] == [item["label"] for item in wanted]


@pytest.mark.slow
def test_an_audio_pipeline_takes_the_folder(tmp_path):
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, id2label=LABELS,
    )  # fmt: skip
    model = seeded(lambda: transformers.Wav2Vec2ForSequenceClassification(config))
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000)
    sound = numpy.sin(numpy.arange(1600, dtype=numpy.float32) / 7)
    fast = lissom.compile(model, dict(extractor(sound, sampling_rate=16000, return_tensors="pt")), checks="structural")
    fast.save(tmp_path / "model", processor=extractor)
    wanted = pipeline("audio-classification", model=model, feature_extractor=extractor, device="cpu", top_k=1)(sound)
    found = pipeline("audio-classification", model=str(tmp_path / "model"), device="cpu", top_k=1)(sound)
    assert [item["label"] for item in found] == [item["label"] for item in wanted]


@pytest.mark.slow
def test_a_decoder_is_loaded_by_its_auto_class(tmp_path):
    decoder = lissom.compile_generation(llama(), max_length=16, checks="structural")
    decoder.save(tmp_path / "decoder")
    assert json.loads((tmp_path / "decoder" / "config.json").read_text())["model_type"] == "lissom"
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoder")
    ids = tokens(1, 4)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found.generate(ids, **options), decoder.generate(ids, **options))
    assert found.config.vocab_size == SIZES["vocab_size"]


@pytest.mark.slow
def test_transformers_serve_loads_a_decoder(tokenizer, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"vocab_size": len(tokenizer)})).eval()
    model.config.architectures = ["LlamaForCausalLM"]
    lissom.compile_generation(model, max_length=16, checks="structural").save(tmp_path / "decoder", tokenizer)
    served = ModelManager(device="cpu", model_timeout=-1)
    found, used = served.load_model_and_processor(str(tmp_path / "decoder"))
    served.shutdown()
    assert type(found).__name__ == "LlamaForCausalLM" and found.config.architectures == ["LlamaForCausalLM"]
    ids = used("A lake.", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "tokenizer": used}  # as the server calls it
    wanted = model.generate(ids, **options)
    assert torch.equal(found.generate(ids, **options), wanted)
    options["stop_strings"] = used.decode(wanted[0, ids.shape[1] + 2])
    assert torch.equal(found.generate(ids, **options), model.generate(ids, **options))


def test_an_auto_class_asks_for_a_signature(folder, tmp_path):
    """Also where config.json has fields of these names, which transformers prefers to the arguments."""
    changed = shutil.copytree(folder, tmp_path / "changed")
    fields = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(fields | {"trusted_keys": None, "allow_native": True}))
    seal(changed)
    for path in (folder, changed):
        assert type(AutoModelForSequenceClassification.from_pretrained(path)).__name__ == "BertForSequenceClassification"
        for keys in ("key.pub.pem", ["key.pub.pem"], []):
            with pytest.raises(ArtifactError, match=r"is not signed|the key 'key\.pub\.pem' cannot be read"):
                AutoModelForSequenceClassification.from_pretrained(path, trusted_keys=keys)
    with pytest.raises(InputError, match=r"takes no trusted_key=; give trusted_keys=$"):
        AutoModelForSequenceClassification.from_pretrained(folder, trusted_key="key.pub.pem")


def test_an_auto_class_with_keys_refuses_a_checkpoint(classifier, tmp_path):
    """Also where config.json has a field of that name, which takes the option away."""
    classifier.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for more in ({}, {"trusted_keys": None}):
        config.write_text(json.dumps(json.loads(config.read_text()) | more))
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path).num_labels == 2
        for keys in ("key.pub.pem", []):
            with pytest.raises(InputError, match=r"and only these are signed; leave trusted_keys= out$"):
                AutoModelForSequenceClassification.from_pretrained(tmp_path, trusted_keys=keys)


def test_a_configuration_is_registered_once():
    before = vars(transformers.AutoConfig)["from_pretrained"]
    register_config()
    assert vars(transformers.AutoConfig)["from_pretrained"] is before


def cached(folder: Path, cache: Path) -> Path:
    """A repository `some/model` in a cache of the Hub, with links to the files of a folder."""
    repo, commit = cache / "models--some--model", "a" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    return repo


def test_link_in_cache_of_hub_fills_no_disk(folder, tmp_path):
    repo = cached(folder, tmp_path)
    weights = repo / "snapshots" / ("a" * 40) / "weights.safetensors"
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors' is not a regular file"):
        SavedModel.from_pretrained("some/model", cache_dir=str(tmp_path), local_files_only=True)
    assert list((repo / "lissom").iterdir()) == []


@pytest.mark.parametrize("step", ["link", "rename"])
def test_a_cache_of_the_hub_that_takes_no_copy(folder, tmp_path, monkeypatch, step):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    repo = cached(folder, tmp_path)
    monkeypatch.setattr(*((os, "link", refuse) if step == "link" else (Path, "rename", refuse)))
    usage = shutil.disk_usage(tmp_path)._replace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    said = f"9 are free in '{repo}/lissom'" if step == "link" else f"'{repo}/lissom' cannot be written: No space left on device"
    with pytest.raises(ArtifactError, match=re.escape(said)):
        SavedModel.from_pretrained("some/model", cache_dir=str(tmp_path), local_files_only=True)
