"""Tests of tokenizers for pruned vocabularies: what they produce on any text, and how they are numbered."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, processors

from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.errors import ArtifactError, UnsupportedError
from lissom.passes.prune.prune_vocabulary.choice import Choice
from lissom.passes.prune.prune_vocabulary.closure import closure_of
from lissom.passes.prune.prune_vocabulary.stored_tokenizer import StoredTokenizer
from tests.support.tokenizers import CORPUS, KINDS, tokenizer

_PIECES = st.sampled_from([*" ".join(CORPUS[:5]).split(), " ", "foxy", "<s>", "<mask>", "ß", "…", "👩‍🔬", "▁", "</w>"])
TEXTS = st.one_of(
    st.text(max_size=30), st.lists(_PIECES, max_size=12).map(" ".join), st.lists(_PIECES, max_size=8).map("".join)
)
_FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def stored(kind: str) -> StoredTokenizer:
    return StoredTokenizer.parse(tokenizer(kind).to_str(), kind)


def pruned(old: StoredTokenizer, wanted: Iterable[int]) -> tuple[StoredTokenizer, Vocabulary]:
    """The tokenizer with these tokens, those that must stay, and their parts."""
    kept = Choice(closure_of(old), {*wanted} | old.required).kept
    vocabulary = Vocabulary(torch.tensor(sorted(kept)), len(old.names), old.unknown, "tokenizer", "compact")
    return StoredTokenizer.parse(json.dumps(old.renumbered(vocabulary)), "new"), vocabulary


def sample(old: StoredTokenizer, seed: int, share: float) -> list[int]:
    """Some tokens, and the added ones: without them a text is split at other places, and spaces are added at others."""
    draw = random.Random(seed)
    added = [int(token["id"]) for token in old.data["added_tokens"]]
    return [*added, *(index for index in sorted(old.names) if draw.random() < share)]


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, seed=st.integers(0, 9), share=st.sampled_from([0.0, 0.3, 0.8]))
@_FEW
def test_any_text(kind: str, text: str, seed: int, share: float) -> None:
    old = stored(kind)
    new, vocabulary = pruned(old, sample(old, seed, share))
    ids, original = new.library.encode(text).ids, old.library.encode(text).ids
    assert all(0 <= index < len(vocabulary.kept) for index in ids)
    assert [new.names[index] for index in ids] == [old.names[int(vocabulary.kept[index])] for index in ids]
    if old.unknown is None or new.unknown not in ids:
        assert new.library.decode(ids) == old.library.decode(original)
    new_ids = vocabulary.new_ids[original]
    if bool((new_ids >= 0).all()) and old.unknown not in original:
        assert ids == new_ids.tolist()


@pytest.mark.parametrize("kind", ["byte-level", "byte-level-whole-words"])
@given(text=st.text(max_size=40), seed=st.integers(0, 9))
@_FEW
def test_bytes_write_every_text(kind: str, text: str, seed: int) -> None:
    old = stored(kind)
    new, _ = pruned(old, sample(old, seed, 0.2))
    ids = new.library.encode(text, add_special_tokens=False).ids
    assert new.library.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_that_stays_is_produced(kind: str) -> None:
    """A token that the original produces for its own text is produced for it by the new tokenizer."""
    old = stored(kind)
    new, vocabulary = pruned(old, sample(old, 1, 0.3))
    produced = 0
    for index in vocabulary.kept.tolist():
        text = old.library.decode([index], skip_special_tokens=False)
        if old.library.encode(text, add_special_tokens=False).ids == [index]:
            produced += 1
            assert new.library.encode(text, add_special_tokens=False).ids == [int(vocabulary.new_ids[index])]
    assert produced > 5


@pytest.mark.parametrize("kind", KINDS)
def test_templates_padding_and_added_tokens_are_renumbered(kind: str) -> None:
    old = stored(kind)
    new, vocabulary = pruned(old, [old.ids["foxy"]])
    assert {"<pad>", "<unk>", "<s>", "</s>", "<mask>", "<extra>", "foxy"} <= {*new.ids}
    assert "unseen" not in new.ids
    first, second = new.library.encode_batch(["the dog", "a"])
    assert len(first.ids) == len(second.ids)
    names = [new.names[index] for index in second.ids]
    assert (names[0], names[-1]) == ("<s>", "<pad>")
    assert "foxy" in new.library.encode("a foxy dog").tokens
    assert sorted(new.ids.values()) == list(range(len(vocabulary.kept)))


def test_merges_are_closed() -> None:
    old = stored("byte-level")
    index = max(old.names, key=lambda index: len(old.names[index]) if old.names[index] in old.model["vocab"] else 0)
    parts = {old.names[part] for part in closure_of(old)(index)}
    made = {(left, right) for left, right in old.model["merges"] if left in parts and right in parts and left + right in parts}
    assert old.names[index] in parts
    for name in parts:
        assert len(name) == 1 or any(left + right == name for left, right in made)


def test_roberta_post_processors() -> None:
    library = Tokenizer.from_str(tokenizer("byte-level").to_str())
    first, last = library.token_to_id("<s>"), library.token_to_id("</s>")
    library.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(("</s>", last), ("<s>", first))]
    )
    old = StoredTokenizer.parse(library.to_str(), "old")
    new, _ = pruned(old, [])
    assert new.library.encode("a").tokens[0] == "<s>"
    assert [new.names[index] for index in new.library.encode("a").ids] == old.library.encode("a").tokens


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "BPE"}}', '{"version": "1.0", "model": 3}', "\0"])
def test_broken_files(text: str) -> None:
    with pytest.raises(ArtifactError, match="the file is no tokenizer of the tokenizers library: "):
        StoredTokenizer.parse(text, "the file")


def test_tokens_that_the_library_numbers_in_another_way() -> None:
    """Ids of words with a gap that an added token fills."""
    library = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2, "c": 9}, unk_token="<unk>"))
    library.add_tokens(["new"])
    old = StoredTokenizer.parse(library.to_str(), "old")
    assert old.ids["new"] in (3, 4, 10)
    with pytest.raises(UnsupportedError, match=r"the tokenizers library numbers the token '\w+' as "):
        pruned(old, [old.ids["c"], old.ids["new"]])


def test_tokenizers_of_larger_models() -> None:
    old = stored("word-piece")
    vocabulary = Vocabulary(torch.tensor([3, 4]), 5, None, "tokenizer", "compact")
    with pytest.raises(
        UnsupportedError, match=r"the tokenizer inserts the token id 0, which the model's 5 ids do not have; give"
    ):
        old.renumbered(vocabulary)


def test_a_dropped_added_token_is_written_with_others() -> None:
    old = stored("byte-level")
    new, _ = pruned(old, [])
    assert "unseen" in old.library.encode("an unseen dog").tokens
    tokens = new.library.encode("an unseen dog", add_special_tokens=False)
    assert "unseen" not in tokens.tokens
    assert new.library.decode(tokens.ids) == "an unseen dog"
