"""A tokenizer as the tokenizers library stores it: its tokens, those that must stay, and its form for new ids.

Format: https://huggingface.co/docs/tokenizers. The library parses the file first, so what is read here has its form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.models.huggingface import tokenizer_of
from lissom.io.files import read_plain

FILE = "tokenizer.json"
_MOST_BYTES = 512 << 20
_SPACE = "▁"
"""A space in tokens as SentencePiece writes them."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, eq=False)
class StoredTokenizer:
    """A tokenizer.

    Attributes:
        library: of the tokenizers library.
        data: its JSON.
    """

    library: Any
    data: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str, where: str) -> StoredTokenizer:
        """A tokenizer from JSON.

        Raises:
            ArtifactError: if the tokenizers library cannot read it.
            UnsupportedError: without the library.
        """
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UnsupportedError("a tokenizer needs the tokenizers library: pip install tokenizers") from error
        try:
            library = Tokenizer.from_str(text)
        # The library raises plain exceptions for a broken file.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ArtifactError(f"{where} is no tokenizer of the tokenizers library: {reason:.200}") from error
        return cls(library, json.loads(library.to_str()))

    @property
    def model(self) -> Mapping[str, Any]:
        return self.data["model"]

    @property
    def kind(self) -> str:
        """`BPE`, `Unigram`, `WordPiece` or `WordLevel`."""
        return str(self.model["type"])

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token, added tokens included."""
        return self.library.get_vocab(with_added_tokens=True)

    @cached_property
    def names(self) -> Mapping[int, str]:
        """The token of each id."""
        return {index: token for token, index in self.ids.items()}

    @cached_property
    def unknown(self) -> int | None:
        """The id of the unknown token; None if there is none."""
        if self.kind == "Unigram":
            return self.model.get("unk_id")
        return self.ids.get(self.model.get("unk_token") or "")

    @cached_property
    def byte_tokens(self) -> set[int]:
        """The tokens of single bytes, with which every text can be written, and that of a space, which decoders turn back."""
        from tokenizers.pre_tokenizers import ByteLevel

        steps = _steps(self.data.get("pre_tokenizer")) + _steps(self.data.get("decoder"))
        alphabet = set(ByteLevel.alphabet()) if any(step.get("type") == "ByteLevel" for step in steps) else set[str]()
        fallback = bool(self.model.get("byte_fallback"))
        alphabet |= {_SPACE} if self.kind in ("BPE", "Unigram") else set[str]()
        return {index for token, index in self.ids.items() if token in alphabet or (fallback and _BYTE.fullmatch(token))}

    @cached_property
    def required(self) -> set[int]:
        """The ids that always stay: special, unknown and byte tokens, and what templates and padding insert."""
        special = {int(token["id"]) for token in self.data.get("added_tokens") or () if token["special"]}
        return special | self._inserted | self.byte_tokens

    @cached_property
    def _inserted(self) -> set[int]:
        """The ids that templates and padding insert, and that of the unknown token."""
        padding = self.data.get("padding") or {}
        inserted = {int(padding["pad_id"])} if "pad_id" in padding else set[int]()
        for step in _steps(self.data.get("post_processor")):
            inserted |= set(_inserted(step))
        return inserted | ({self.unknown} if self.unknown is not None else set[int]())

    def text_of(self, index: int) -> str:
        """The text of a token."""
        return self.library.decode([index], skip_special_tokens=False)

    def renumbered(self, vocabulary: Vocabulary) -> dict[str, Any]:
        """The JSON of the tokenizer for new ids: with the tokens that stay only, and merges of those.

        Raises:
            UnsupportedError: for a kind of tokenizer that cannot be renumbered.
        """
        new = {int(old): place for place, old in enumerate(vocabulary.kept.tolist())}
        outside = next((index for index in sorted(self._inserted) if index not in new), None)
        if outside is not None:
            raise UnsupportedError(
                f"the tokenizer inserts the token id {outside}, which the model's {vocabulary.size} ids do not have; give the "
                f"tokenizer of this model in tokenizer="
            )
        data: dict[str, Any] = deepcopy(dict(self.data))
        data["model"] = self._model(new)
        added = [token for token in data.get("added_tokens") or () if token["id"] in new]
        data["added_tokens"] = [{**token, "id": new[token["id"]]} for token in added]
        if data.get("padding"):
            data["padding"]["pad_id"] = new[data["padding"]["pad_id"]]
        for step in _steps(data.get("post_processor")):
            _renumber(step, new)
        self._check(data, new)
        return data

    def _model(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The model with the tokens that stay."""
        model = dict(self.model)
        if self.kind == "Unigram":
            model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new]
            model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
            return model
        if self.kind not in ("BPE", "WordPiece", "WordLevel"):
            raise UnsupportedError(
                f"prune-vocabulary{{ids=tokenizer}} takes BPE, Unigram, WordPiece and WordLevel tokenizers, not {self.kind}; "
                f"use ids=graph"
            )
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
        if self.kind == "BPE":
            prefix = str(model.get("continuing_subword_prefix") or "")
            model["merges"] = [
                pair for pair in model["merges"] if all(part in model["vocab"] for part in (*pair, merged(pair, prefix)))
            ]
        return model

    def _check(self, data: Mapping[str, Any], new: Mapping[int, int]) -> None:
        """Refuse a tokenizer that the library numbers in another way. Raises UnsupportedError."""
        other = StoredTokenizer.parse(json.dumps(data, ensure_ascii=False), "the new tokenizer")
        wanted = {token: new[index] for token, index in self.ids.items() if index in new}
        if dict(other.ids) != wanted:
            token = next(token for token in [*wanted, *other.ids] if wanted.get(token) != other.ids.get(token))
            raise UnsupportedError(
                f"the tokenizers library numbers the token {token!r:.60} as {other.ids.get(token)} and not as "
                f"{wanted.get(token)}, after other tokens were dropped; use prune-vocabulary{{ids=graph}}"
            )


def merged(pair: Sequence[str], prefix: str) -> str:
    """The token that a merge makes of two.

    Args:
        prefix: of tokens that continue a word.
    """
    return pair[0] + pair[1][len(prefix) :]


def find_tokenizer(option: str, about: object) -> StoredTokenizer | None:
    """The tokenizer of the option, or of the folder the model came from; None if there is none.

    Args:
        option: a folder, or a file of the tokenizers library.
        about: what is known of the model.

    Raises:
        InputError: if the option names neither.
        ArtifactError: if the file cannot be read.
    """
    if option:
        path = Path(option) / FILE if Path(option).is_dir() else Path(option)
        if not path.is_file():
            raise InputError(
                f"prune-vocabulary{{tokenizer=}}: there is no file '{path}'; name a folder with {FILE}, or such a file"
            )
        return _read(path)
    source = getattr(about, "source", None)
    if source is None or not Path(str(source)).is_dir():
        return None
    path = Path(str(source)) / FILE
    return _read(path) if path.is_file() else _converted(path.parent)


def _converted(folder: Path) -> StoredTokenizer | None:
    """The tokenizer of a folder that has it in another form, such as a GGUF file; None if it has none that can be converted."""
    try:
        converted: Any = tokenizer_of(folder)
    except ArtifactError:
        return None
    library = getattr(converted, "backend_tokenizer", None)
    return None if library is None else StoredTokenizer.parse(library.to_str(), f"the tokenizer in '{folder}'")


def _read(path: Path) -> StoredTokenizer:
    raw = read_plain(path, _MOST_BYTES, links=True)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ArtifactError(f"'{path}' is no text in UTF-8: {error.reason} at byte {error.start}") from error
    return StoredTokenizer.parse(text, f"'{path}'")


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, itself or those of a sequence."""
    if not part:
        return []
    inner = next((part[key] for key in ("pretokenizers", "processors", "decoders") if key in part), None)
    return [part] if inner is None else [step for other in inner for step in _steps(other)]


def _inserted(step: Mapping[str, Any]) -> list[int]:
    """The ids that a post-processor inserts."""
    if step.get("type") == "TemplateProcessing":
        return [int(index) for token in step["special_tokens"].values() for index in token["ids"]]
    return [int(step[key][1]) for key in ("sep", "cls") if key in step]


def _renumber(step: dict[str, Any], new: Mapping[int, int]) -> None:
    """Give a post-processor the new ids of what it inserts."""
    if step.get("type") == "TemplateProcessing":
        for token in step["special_tokens"].values():
            token["ids"] = [new[index] for index in token["ids"]]
    for key in ("sep", "cls"):
        if key in step:
            step[key] = [step[key][0], new[step[key][1]]]
