"""Tests of prune-vocabulary with ids=tokenizer: models with the ids of a new tokenizer, in every form they are saved in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast

import lissom
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.errors import InputError, UnsupportedError
from tests.support import captures
from tests.support.models import seeded
from tests.support.neighbours import all_but_slow
from tests.support.tokenizers import CORPUS, tokenizer

_TEXTS = CORPUS[:2]
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}


def _bert(**ids: Any) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, **ids))


def _xlm_roberta(**ids: Any) -> nn.Module:
    """Its positions come from comparing ids with that of padding."""
    return transformers.XLMRobertaForMaskedLM(transformers.XLMRobertaConfig(**_SIZES, **ids))


def _modernbert(**ids: Any) -> nn.Module:
    config = transformers.ModernBertConfig(**_SIZES, **ids, cls_token_id=2, sep_token_id=3, reference_compile=False)
    return transformers.ModernBertForMaskedLM(config)


def _llama(tied: bool = False, **ids: Any) -> nn.Module:
    config = transformers.LlamaConfig(**_SIZES, **ids, num_key_value_heads=2, use_cache=False, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def _gemma(**ids: Any) -> nn.Module:
    config = transformers.Gemma2Config(**_SIZES, **ids, num_key_value_heads=2, head_dim=8, use_cache=False)
    return transformers.Gemma2ForCausalLM(config)


def _t5(**ids: Any) -> nn.Module:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0, use_cache=False,
        **{name: value for name, value in ids.items() if name != "bos_token_id"},
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "bert": ("word-piece", _bert),
    "xlm-roberta": ("unigram", _xlm_roberta),
    "modernbert": ("byte-level", _modernbert),
    "llama": ("byte-fallback", _llama),
    "llama-tied": ("byte-level-whole-words", lambda **ids: _llama(tied=True, **ids)),
    "gemma2": ("unigram-bytes", _gemma),
    "t5": ("unigram", _t5),
}


@dataclass(frozen=True)
class Made:
    """A model, its tokenizer, and the folder with both."""

    model: Any
    tokenizer: PreTrainedTokenizerFast
    folder: Path

    def inputs(self, texts: tuple[str, ...], tokenizer: PreTrainedTokenizerFast | None = None) -> dict[str, torch.Tensor]:
        encoded = (tokenizer or self.tokenizer)(list(texts), padding=True, return_tensors="pt")
        given = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        if self.model.config.is_encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"][:, :4]
        return given


@cache
def _folders() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp())


@cache
def made(name: str) -> Made:
    kind, build = MODELS[name]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind), **_NAMES, model_max_length=64)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    folder = _folders() / name
    # Three rows have no token, as in models that round the number of rows up.
    seeded(lambda: build(vocab_size=len(wrapped) + 3, **ids)).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    model = seeded(lambda: build(vocab_size=len(wrapped) + 3, **ids))
    loaded = type(model).from_pretrained(folder).eval()
    return Made(loaded, wrapped, folder)


def renumbered(vocabulary: Vocabulary, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: vocabulary.renumbered(value) if "ids" in name else value for name, value in inputs.items()}


def pruned(case: Made, options: str = "coverage=1,ids=tokenizer") -> tuple[Any, Vocabulary]:
    inputs = case.inputs(_TEXTS)
    small = captures.optimize(case.model, inputs, passes=f"prune-vocabulary{{{options}}}", data=[inputs])
    assert small.program.vocabulary is not None
    return small, small.program.vocabulary


@pytest.mark.parametrize("name", all_but_slow(MODELS, *(MODELS.keys() - {"t5"})))
def test_the_new_tokenizer_gives_the_ids_that_the_program_takes(name: str) -> None:
    case = made(name)
    small, vocabulary = pruned(case)
    new = lissom.pruned_tokenizer(small)
    assert len(new) == len(vocabulary.kept) < vocabulary.size
    inputs, ours = case.inputs(_TEXTS), case.inputs(_TEXTS, new)
    assert torch.equal(ours["input_ids"], renumbered(vocabulary, inputs)["input_ids"])
    whole = captures.optimize(case.model, inputs)
    wanted, actual = whole.program(**inputs)[0], small.program(**ours)[0]  # type: ignore[index]
    assert torch.equal(wanted[..., vocabulary.kept], actual)
    names = {key: getattr(new, key) for key in _NAMES}
    assert names == _NAMES
    assert new.model_max_length == 64
    assert new.batch_decode(ours["input_ids"], skip_special_tokens=True) == case.tokenizer.batch_decode(
        inputs["input_ids"], skip_special_tokens=True
    )


@pytest.mark.parametrize("name", all_but_slow(MODELS, *(MODELS.keys() - {"t5"})))
def test_no_map_of_ids_is_left_in_the_program(name: str) -> None:
    small, vocabulary = pruned(made(name))
    weights = small.program.weights()
    assert not any(key.startswith("vocabulary.") for key in weights)
    assert not any(vocabulary.size in weight.shape for weight in weights.values())


PLAIN = ("bert", "llama", "llama-tied", "xlm-roberta")


@pytest.mark.parametrize("name", all_but_slow([*PLAIN, "t5"], *PLAIN))
def test_checkpoints(name: str, tmp_path: Path) -> None:
    case = made(name)
    small, vocabulary = pruned(case)
    small.save_pretrained(tmp_path / "checkpoint")
    plain = type(case.model).from_pretrained(tmp_path / "checkpoint").eval()
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert plain.config.vocab_size == len(new) == len(vocabulary.kept)
    assert (plain.config.pad_token_id, plain.config.eos_token_id) == (new.pad_token_id, new.eos_token_id)
    inputs = case.inputs(_TEXTS, new)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, small.program(**inputs)[0])


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_saved_models(backend: str, tmp_path: Path) -> None:
    case = made("bert")
    inputs = case.inputs(_TEXTS)
    passes = "prune-vocabulary{coverage=1,ids=tokenizer}"
    small = captures.compile(case.model, inputs, passes=passes, data=[inputs], backend=backend)
    small.save(tmp_path / "saved")
    loaded = lissom.load(tmp_path / "saved")
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["vocab_size"] == len(new) == len(lissom.pruned_tokenizer(loaded))
    ours = case.inputs(_TEXTS, new)
    with torch.inference_mode():
        wanted = case.model(**inputs).logits[..., loaded.program.vocabulary.kept]  # type: ignore[union-attr]
        # Kernels sum in another order.
        torch.testing.assert_close(loaded(**ours).logits, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"the tokenizer has \d+ tokens, and .* has embeddings for \d+; leave it out, or give"):
        small.save(tmp_path / "other", tokenizer=case.tokenizer)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_onnx_folders(tmp_path: Path) -> None:
    case = made("bert")
    inputs = case.inputs(_TEXTS)
    for ids in ("tokenizer", "graph"):
        passes = f"prune-vocabulary{{coverage=1,ids={ids}}}"
        small = captures.compile(case.model, inputs, passes=passes, data=[inputs], backend="onnxruntime")
        small.export_onnx(tmp_path / ids, dtypes=["fp32"])
        written = json.loads((tmp_path / ids / "config.json").read_text())
        stored = json.loads((tmp_path / ids / "tokenizer.json").read_text())
        assert len(stored["model"]["vocab"]) <= written["vocab_size"]
        assert (written["vocab_size"] == case.model.config.vocab_size) == (ids == "graph")
    with pytest.raises(
        UnsupportedError, match=r"original= takes other token ids than .*, whose vocabulary was pruned; leave it"
    ):
        captures.compile(
            case.model, inputs, passes="prune-vocabulary{coverage=1,ids=tokenizer}", data=[inputs], backend="onnxruntime"
        ).export_onnx(tmp_path / "third", original=case.model)


def test_gguf_files(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    small, vocabulary = pruned(made("llama"))
    small.export_gguf(tmp_path / "small.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "small.gguf"))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    new = lissom.pruned_tokenizer(small)
    assert tokens == new.convert_ids_to_tokens(list(range(len(new))))
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert [int(size) for size in table.shape] == [32, len(vocabulary.kept)]
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == new.eos_token_id


@pytest.mark.parametrize("what", ["checkpoint", "GGUF file"])
def test_programs_that_map_ids_are_not_exported(what: str, tmp_path: Path) -> None:
    small, _ = pruned(made("llama"), "coverage=1")
    export = small.save_pretrained if what == "checkpoint" else small.export_gguf
    with pytest.raises(UnsupportedError, match=f"maps token ids in its graph, which a {what} cannot say; use prune-vocabulary"):
        export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scripts() -> None:
    case = made("xlm-roberta")
    _, vocabulary = pruned(case, "scripts=latin,ids=tokenizer".replace("latin", '"latin"'))
    names = case.tokenizer.convert_ids_to_tokens(vocabulary.kept.tolist())
    assert {"a", "▁the", "0", ".", "<s>"} <= {*names}
    assert not any("а" <= letter <= "я" or "α" <= letter <= "ω" or letter == "日" for name in names for letter in name)
    _, both = pruned(case, 'scripts="latin,cyrillic"')
    assert {*vocabulary.kept.tolist()} < {*both.kept.tolist()}
    _, few = pruned(case, 'scripts="cyrillic",keep=30')
    assert len(few.kept) == 30


def test_tokens_by_name(tmp_path: Path) -> None:
    case = made("bert")
    path = tmp_path / "tokens.txt"
    path.write_text("the\ndog\n7\n")
    _, vocabulary = pruned(case, f'tokens="{path}"')
    wanted = case.tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "<s>", "</s>", "<mask>", "<extra>", "the", "dog"])
    assert {*vocabulary.kept.tolist()} == {*wanted, 7}
    path.write_text("foxes\n")
    with pytest.raises(
        InputError, match=r"line 1: the tokenizer has no token 'foxes'; give ids, or tokens as tokenizer.json has"
    ):
        pruned(case, f'tokens="{path}"')


def test_dropped_ids_are_read_as_unknown() -> None:
    case = made("bert")
    small, vocabulary = pruned(case, "keep=40")
    assert vocabulary.unknown == case.tokenizer.unk_token_id
    inputs = case.inputs(("日本語の文章",))
    assert bool(vocabulary.dropped[inputs["input_ids"]].any())
    unknown = inputs | {"input_ids": vocabulary.readable(inputs["input_ids"])}
    assert torch.equal(small.program(**inputs)[0], small.program(**unknown)[0])


class Argmax(nn.Module):
    """Reads the place of the largest id, as CLIP does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids).sum(1) * input_ids.argmax(1, keepdim=True)


def test_models_that_compute_with_ids_are_refused() -> None:
    passes = f'prune-vocabulary{{keep=400,ids=tokenizer,tokenizer="{made("llama").folder}"}}'
    with pytest.raises(UnsupportedError, match=r"cannot renumber the ids: 'argmax' computes with them; use ids=graph"):
        captures.optimize(seeded(Argmax), torch.randint(0, 99, (2, 5)), passes=passes)


def test_models_with_original_ids_have_no_new_tokenizer() -> None:
    small, _ = pruned(made("bert"), "keep=60")
    with pytest.raises(
        UnsupportedError, match=r"takes the ids of its original tokenizer; compile it with prune-vocabulary\{ids"
    ):
        lissom.pruned_tokenizer(small)
    with pytest.raises(InputError, match=r"model= is 3; give what lissom.compile, compile_generation or optimize returned"):
        lissom.pruned_tokenizer(3)  # type: ignore[arg-type]
