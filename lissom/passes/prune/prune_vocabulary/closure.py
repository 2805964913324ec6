"""The tokens that a tokenizer needs to produce others.

BPE builds a token by merges: joining its parts in the order of their ranks gives the token, and each of these parts must stay.
Tokens of Unigram and WordPiece are produced as they are; their characters stay too, so that words which lose their token can
still be written.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

from lissom.passes.prune.prune_vocabulary.choice import Closure
from lissom.passes.prune.prune_vocabulary.stored_tokenizer import StoredTokenizer, merged


def closure_of(tokenizer: StoredTokenizer | None) -> Closure:
    """For an id the ids that must stay with it; the id alone without a tokenizer."""
    if tokenizer is None:
        return lambda index: (index,)
    added = {int(token["id"]) for token in tokenizer.data.get("added_tokens") or ()}
    if tokenizer.kind == "BPE":
        merges = _Merges(tokenizer)
        return lambda index: (index,) if index in added else merges.parts(index)
    if tokenizer.kind in ("Unigram", "WordPiece"):
        return lambda index: (index,) if index in added else _characters(tokenizer, index)
    return lambda index: (index,)


def _characters(tokenizer: StoredTokenizer, index: int) -> set[int]:
    """A token, and the tokens of its single characters."""
    token, prefix = tokenizer.names[index], str(tokenizer.model.get("continuing_subword_prefix") or "")
    inside = bool(prefix) and token.startswith(prefix)
    letters = token[len(prefix) :] if inside else token
    names = [(prefix if inside or place else "") + letter for place, letter in enumerate(letters)]
    return {index, *(tokenizer.ids[name] for name in names if name in tokenizer.ids)}


class _Merges:
    """The merges of a BPE tokenizer, with their ranks."""

    def __init__(self, tokenizer: StoredTokenizer) -> None:
        model = tokenizer.model
        self._ids, self._names = tokenizer.ids, tokenizer.names
        self._prefix = str(model.get("continuing_subword_prefix") or "")
        self._suffix = str(model.get("end_of_word_suffix") or "")
        self._ranks: Mapping[tuple[str, str], int] = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
        self.parts = lru_cache(maxsize=None)(self._parts)

    def _parts(self, index: int) -> frozenset[int]:
        """A token, and all tokens that the merges make on the way to it."""
        symbols = self._symbols(self._names[index])
        found = {index, *(self._ids[symbol] for symbol in symbols if symbol in self._ids)}
        while len(symbols) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(symbols)]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == len(self._ranks):
                break
            joined = merged(symbols[place : place + 2], self._prefix)
            symbols[place : place + 2] = [joined]
            found.add(self._ids[joined])
        return frozenset(found)

    def _symbols(self, token: str) -> list[str]:
        """The characters of a token as the merges read them."""
        inside = bool(self._prefix) and token.startswith(self._prefix)
        letters = list(token[len(self._prefix) :] if inside else token)
        ends = bool(self._suffix) and token.endswith(self._suffix)
        if ends:
            letters = letters[: -len(self._suffix)]
        symbols = [(self._prefix if inside or place else "") + letter for place, letter in enumerate(letters)]
        if ends and symbols:
            symbols[-1] += self._suffix
        return symbols
