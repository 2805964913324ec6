"""Tests of lissom.integrations.sentence_transformers.sentence_models: models of Sentence Transformers compiled whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding

import lissom
from lissom.errors import ArtifactError, CaptureError, InputError, UnsupportedError
from lissom.frontends.models.huggingface import find_directory
from lissom.integrations.sentence_transformers.compiled_transformer import CompiledTransformer
from tests.support import refusals
from tests.support.sentence_models import (
    PAIRS,
    TEXTS,
    cross_encoder,
    sentence_transformer,
    sparse_encoder,
    transformer,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, in another order of summation
OPTIONS = {"checks": "structural", "goal": None}


@pytest.fixture(scope="module")
def original() -> SentenceTransformer:
    return sentence_transformer(prompts={"query": "query: "}, truncate_dim=6)


@pytest.fixture(scope="module")
def fast(original) -> SentenceTransformer:
    return lissom.compile(original)


@pytest.fixture(scope="module")
def saved(fast, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    fast.save(str(folder))
    return folder


def packed_nodes(model: SentenceTransformer | CrossEncoder | SparseEncoder) -> int:
    return next(step.rewritten for step in model[0].model.report.history.steps if step.spelling == "pack-tokens")


def test_all_modules_are_one_program_without_padding(original, fast):
    assert type(fast) is SentenceTransformer and len(fast) == 1 and len(original) == 4
    assert "Transformer + Pooling + Dense + Normalize" in repr(fast)
    assert packed_nodes(fast) > 0
    assert fast[0].model.program.signature.describe().count("[batch, sequence]") == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 1},
        {"batch_size": 3, "normalize_embeddings": True},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"truncate_dim": 3},
        {"prompt_name": "query"},
        {"prompt": "about: "},
        {"precision": "uint8"},
    ],
    ids=str,
)
def test_encode_gives_what_the_original_gives(original, fast, options):
    wanted, found = (model.encode(TEXTS, **options) for model in (original, fast))
    assert type(found) is type(wanted) and len(found) == len(TEXTS)
    if options.get("precision"):
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
        return
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), **CLOSE)


def test_one_text_and_none(original, fast):
    np.testing.assert_allclose(fast.encode("a text"), original.encode("a text"), **CLOSE)
    assert fast.encode([]).shape == original.encode([]).shape


def test_token_embeddings(original, fast):
    wanted, found = (model.encode(TEXTS, output_value="token_embeddings") for model in (original, fast))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_what_the_model_says_of_itself(original, fast):
    assert fast.get_embedding_dimension() == original.get_embedding_dimension() == 6
    assert (fast.prompts, fast.max_seq_length, fast.similarity_fn_name) == (original.prompts, 64, "cosine")
    assert fast.config.hidden_size == 16 and fast.device == torch.device("cpu")


def test_the_original_is_unchanged(original, fast):
    fast.max_seq_length = 5
    assert original.max_seq_length == 64
    fast.max_seq_length = 64
    assert [type(module).__name__ for module in original] == ["Transformer", "Pooling", "Dense", "Normalize"]


def test_a_saved_model_loads(fast, saved):
    again = SentenceTransformer(str(saved), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), fast.encode(TEXTS))
    assert isinstance(again[0], CompiledTransformer) and again.prompts == fast.prompts
    assert again.get_embedding_dimension() == 6
    # The program alone, without Sentence Transformers.
    features = {name: value for name, value in fast.preprocess(TEXTS).items() if isinstance(value, torch.Tensor)}
    found = lissom.load(saved / "lissom")(**features)
    np.testing.assert_allclose(found["sentence_embedding"][:, :6], fast.encode(TEXTS), **CLOSE)


def test_nothing_saved_is_pickled(saved):
    names = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".md"}
    assert json.loads((saved / "modules.json").read_text())[0]["type"].endswith("compiled_transformer.CompiledTransformer")


def test_a_saved_model_in_a_cache_of_links(fast, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    for path in (folder / "lissom").iterdir():
        path.unlink()
        path.symlink_to(saved / "lissom" / path.name)
    again = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), fast.encode(TEXTS))


def _changed(saved: Path, folder: Path) -> Path:
    return shutil.copytree(saved, folder / "changed")


def test_a_folder_without_the_artifact(saved, tmp_path):
    folder = _changed(saved, tmp_path)
    shutil.rmtree(folder / "lissom")
    with pytest.raises(ArtifactError, match="has no folder 'lissom' with a compiled model; save the model again"):
        SentenceTransformer(str(folder))


def test_a_folder_without_the_fields(saved, tmp_path):
    folder = _changed(saved, tmp_path)
    file = folder / "sentence_bert_config.json"
    fields = json.loads(file.read_text())
    del fields["lissom"]
    file.write_text(json.dumps(fields))
    with pytest.raises(ArtifactError, match=r"in sentence_bert_config\.json, there is no field 'modules'"):
        SentenceTransformer(str(folder))


def test_a_tokenizer_that_does_not_fit(saved, tmp_path):
    """Tokens beyond the vocabulary of the tokenizer itself may be there, as in Gemma 3; they are refused in a call."""
    folder = _changed(saved, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="30522"):
        SentenceTransformer(str(folder), device="cpu").encode("one <more>")
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"]["zzzz"] = 30522
    file.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="the tokenizer has 30523 tokens, and SentenceTransformer has embeddings for 30522"):
        SentenceTransformer(str(folder))


def test_options_of_a_model_that_is_not_compiled(saved):
    with pytest.raises(InputError, match="is compiled, and takes no model_kwargs 'attn_implementation'"):
        SentenceTransformer(str(saved), model_kwargs={"attn_implementation": "eager"})


def _static() -> SentenceTransformer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_directory("minilm"))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu")


@refusals.table(
    {
        "no transformer": (UnsupportedError, "the first module of this SentenceTransformer is a StaticEmbedding", _static),
        "no texts": (InputError, "neither a list of texts nor features", lambda: lissom.compile(cross_encoder(), 3)),
        "ids as lists": (
            *(CaptureError, "SentenceTransformer itself fails on the example inputs, before it is captured: "),
            lambda: lissom.compile(sentence_transformer(), {"input_ids": [[1, 2]]}),
        ),
        "data of one text": (InputError, "data= is a str", lambda: lissom.compile(sentence_transformer(), data="a text")),
        "no example inputs": (InputError, "example_inputs= is missing", lambda: lissom.compile(torch.nn.Linear(2, 2))),
    }
)
def test_bad_calls(refusal):
    kind, text, make = refusal
    refusals.check((kind, text, lambda: lissom.compile(made) if isinstance(made := make(), SentenceTransformer) else made))


def test_a_compiled_model(fast):
    with pytest.raises(CaptureError, match="this SentenceTransformer is compiled already"):
        lissom.compile(fast)


def test_other_features(fast):
    with pytest.raises(InputError, match="compiled for modality='text', and the input has 'image'"):
        fast[0]({"modality": "image"})
    with pytest.raises(InputError, match="compiled for the features input_ids, token_type_ids, attention_mask"):
        fast[0]({"input_ids": torch.ones(1, 2, dtype=torch.int64)})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cls", "max", "lasttoken", "weightedmean", ("mean", "cls")], ids=str)
def test_every_pooling_without_padding(mode):
    model = sentence_transformer(mode)
    fast = lissom.compile(model, **OPTIONS)
    np.testing.assert_allclose(fast.encode(TEXTS), model.encode(TEXTS), **CLOSE)
    assert packed_nodes(fast) > 0


@pytest.mark.slow
def test_pooling_without_the_prompt_stays_outside():
    modules = [transformer(transformers.BertModel), Pooling(16, "mean", include_prompt=False)]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"query": "represent this: "})
    fast = lissom.compile(model, **OPTIONS)
    assert [type(module).__name__ for module in fast] == ["CompiledTransformer", "Pooling"]
    np.testing.assert_allclose(fast.encode_query(TEXTS), model.encode_query(TEXTS), **CLOSE)
    assert packed_nodes(fast) > 0


@pytest.mark.slow
@pytest.mark.parametrize("labels", [1, 3])
def test_cross_encoders(labels, tmp_path):
    model = cross_encoder(labels)
    fast = lissom.compile(model, **OPTIONS)
    fast.save(str(tmp_path / "model"))
    again = CrossEncoder(str(tmp_path / "model"), device="cpu")
    for found in (fast, again):
        np.testing.assert_allclose(found.predict(PAIRS), model.predict(PAIRS), **CLOSE)
        assert found.num_labels == labels
    if labels == 1:
        wanted, found = (each.rank("password", TEXTS) for each in (model, again))
        assert [row["corpus_id"] for row in found] == [row["corpus_id"] for row in wanted]
    assert packed_nodes(fast) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "activation"), [("max", "relu"), ("sum", "log1p_relu")])
def test_sparse_encoders(strategy, activation, tmp_path):
    model = sparse_encoder(strategy, activation)
    fast = lissom.compile(model, **OPTIONS)
    fast.save(str(tmp_path / "model"))
    wanted = model.encode(TEXTS).to_dense()
    for found in (fast, SparseEncoder(str(tmp_path / "model"), device="cpu")):
        torch.testing.assert_close(found.encode(TEXTS).to_dense(), wanted, **CLOSE)
        assert found.get_embedding_dimension() == model.get_embedding_dimension() == 30522
    assert packed_nodes(fast) > 0


@pytest.mark.slow
def test_texts_as_data_and_metric_of_whole_model():
    model = sentence_transformer()
    wanted = model.encode(TEXTS)
    seen: list[type] = []

    def score(candidate: SentenceTransformer) -> float:
        seen.append(type(candidate))
        return float((candidate.encode(TEXTS) * wanted).sum(1).mean())

    passes = "quantize{scheme=int8-static}"
    fast = lissom.compile(model, TEXTS[:2], passes=passes, data=TEXTS, metric=score, max_drop=0.1, simulate=True)
    assert set(seen) == {SentenceTransformer} and len(seen) > 1
    assert (fast.encode(TEXTS) * wanted).sum(1).min() > 0.95


def test_features_as_data():
    model = sentence_transformer()
    fast = lissom.compile(model, passes="quantize{scheme=int8-static}", data=[model.preprocess(TEXTS)], simulate=True)
    assert (fast.encode(TEXTS) * model.encode(TEXTS)).sum(1).min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["exact", "quantize"])
def test_minilm(passes):
    model = SentenceTransformer(str(find_directory("minilm")), device="cpu")
    fast = lissom.compile(model, passes=passes, goal=None)
    wanted, found = model.encode(TEXTS), fast.encode(TEXTS)
    assert (wanted * found).sum(1).min() > (0.99999 if passes == "exact" else 0.98)
    assert packed_nodes(fast) > 0


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("first", ["", "import lissom", "import sentence_transformers, lissom"])
def test_a_saved_model_in_a_new_process(saved, fast, first):
    """Sentence Transformers imports the class itself where it is trusted; else the import of Lissom is enough."""
    options = "" if first else ", trust_remote_code=True"
    code = f"{first}\nfrom sentence_transformers import SentenceTransformer\n"
    code += f"print(SentenceTransformer({str(saved)!r}, device='cpu'{options}).encode({TEXTS[0]!r})[0])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert abs(float(ran.stdout.split()[-1]) - fast.encode(TEXTS[0])[0]) < 1e-5


def test_a_saved_model_asks_for_a_signature(saved):
    with pytest.raises(ArtifactError, match="is not signed, and trusted keys were given"):
        SentenceTransformer(str(saved), model_kwargs={"trusted_keys": []})
