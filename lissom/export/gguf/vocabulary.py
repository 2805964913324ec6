"""The vocabulary of a GGUF file, from a tokenizer of transformers or from the GGUF file that a model was read from.

llama.cpp has tokenizers of its own. Two of them compute what a BPE tokenizer of transformers does: `llama`, for tokenizers made
by SentencePiece, which fall back to bytes, and `gpt2`, for byte-level ones, whose first split of a text it knows by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lissom.errors import UnsupportedError

_SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS + r"\p{N}{1,3}" + _REST, "ByteLevel"): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, "ByteLevel"): "qwen2",
}
"""llama.cpp's names for the first split of a text, by the pre-tokenizers of transformers."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE_TOKEN = 1, 2, 3, 4, 5, 6
"""gguf.TokenType."""
_PHI = re.compile(r"phi-?3", re.IGNORECASE)
"""In files whose name matches, llama.cpp drops spaces after all added tokens except these."""
_KEEP_SPACES = frozenset(("<unk>", "<s>", "<|endoftext|>"))


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and how texts are split into them.

    Attributes:
        fields: metadata by its key, such as `tokenizer.ggml.model`, with the value's type and the type of an array's items.
        drops_spaces: spaces after added tokens are dropped, as in Phi-3.
    """

    fields: Mapping[str, tuple[Any, ...]]
    drops_spaces: bool = False

    def name_of_file(self, name: str) -> str:
        """The name with which llama.cpp treats spaces as the tokenizer does. Without this, it fails on other vocabularies."""
        if self.drops_spaces:
            return name if _PHI.search(name) else f"Phi-3 {name}"
        return _PHI.sub("Phi", name)

    def plain_ids(self) -> list[int]:
        """The tokens of ASCII characters, which llama.cpp tells one by one: it waits for the rest of a longer character."""
        texts, types = (self.fields[f"tokenizer.ggml.{key}"][0] for key in ("tokens", "token_type"))
        return [index for index, text in enumerate(texts) if types[index] == _NORMAL and text.isascii()]

    def write(self, writer: Any) -> None:
        """Write the metadata.

        Args:
            writer: a GGUFWriter.
        """
        for key, value in self.fields.items():
            writer.add_key_value(key, *value)


@dataclass
class _Tokens:
    texts: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list[float])
    merges: list[str] = field(default_factory=list[str])


def read_vocabulary(tokenizer: Any, source: str | None, rows: int) -> Vocabulary:
    """The vocabulary of a model.

    Args:
        tokenizer: of transformers; by default that of the model's folder.
        source: the folder that the model came from.
        rows: of the embedding table; those without a token are marked unused.

    Raises:
        UnsupportedError: if there is no tokenizer, or llama.cpp has none like it.
    """
    if tokenizer is None and source is not None:
        file = _gguf_file(Path(source))
        if file is not None:
            return _from_file(file, rows)
        tokenizer = _of_folder(source)
    if tokenizer is None:
        raise UnsupportedError("llama.cpp needs the vocabulary, and the model's folder has no tokenizer; pass tokenizer=")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"tokenizer= is {tokenizer!r:.80}; give a fast tokenizer of transformers, which has backend_tokenizer"
        )
    return _from_tokenizer(tokenizer, json.loads(backend.to_str()), rows)


def _of_folder(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    # Tokenizers raise errors of their own where a file is missing.
    except (OSError, ValueError, ImportError):
        return None


def _gguf_file(source: Path) -> Path | None:
    """The GGUF file of a folder that has no other model."""
    if not source.is_dir() or (source / "config.json").exists():
        return None
    files = sorted(source.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _from_file(file: Path, rows: int) -> Vocabulary:
    from gguf import GGUFReader

    reader: Any = GGUFReader(str(file))
    fields: dict[str, tuple[Any, ...]] = {}
    for key, entry in reader.fields.items():
        if key.startswith("tokenizer."):
            fields[key] = (entry.contents(), entry.types[0], *entry.types[1:][-1:])
    count = len(fields["tokenizer.ggml.tokens"][0]) if "tokenizer.ggml.tokens" in fields else 0
    if count != rows:
        raise UnsupportedError(f"{file} has {count} tokens, and the model's embedding table {rows} rows; pass tokenizer=")
    name = reader.fields.get("general.name")
    return Vocabulary(fields, name is not None and _PHI.search(str(name.contents())) is not None)


def _from_tokenizer(tokenizer: Any, stored: Mapping[str, Any], rows: int) -> Vocabulary:
    from gguf import GGUFValueType as Type

    model = stored["model"]
    split = _split(stored)
    by_bytes = bool(model.get("byte_fallback"))
    name = None if by_bytes else _SPLITS.get(split)
    if (
        model.get("type") != "BPE"
        or (name is None and not by_bytes)
        or bool(model.get("ignore_merges")) != (name == "llama-bpe")
    ):
        raise UnsupportedError(
            f"llama.cpp has no tokenizer like this one, {model.get('type')} after {' and '.join(split)[:200] or 'no split'}; "
            f"GGUF files are written for BPE with byte_fallback, and byte-level BPE split as by {', '.join(_SPLITS.values())}"
        )
    tokens = _tokens(stored, rows, by_bytes=by_bytes)
    strings, numbers = (Type.ARRAY, Type.STRING), (Type.ARRAY, Type.INT32)
    ids = tokenizer("a").input_ids
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
    fields: dict[str, tuple[Any, ...]] = {
        "model": ("llama" if by_bytes else "gpt2", Type.STRING),
        "pre": (name or "default", Type.STRING),
        "tokens": (tokens.texts, *strings),
        "token_type": (tokens.types, *numbers),
        "add_bos_token": (ids[:1] == [tokenizer.bos_token_id], Type.BOOL),
        "add_eos_token": (ids[-1:] == [tokenizer.eos_token_id], Type.BOOL),
    }
    if by_bytes:
        fields["scores"] = (tokens.scores, Type.ARRAY, Type.FLOAT32)
        fields["add_space_prefix"] = (pieces[:1] != [] and pieces[0].startswith(_SPACE), Type.BOOL)
    else:
        fields["merges"] = (tokens.merges, *strings)
    special = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, ours in special.items():
        index = getattr(tokenizer, f"{ours}_token_id", None)
        if index is not None:
            fields[f"{key}_token_id"] = (int(index), Type.UINT32)
    named = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        named["tokenizer.chat_template"] = (template, Type.STRING)
    return Vocabulary(named, _drops_spaces(stored, tokens.texts))


def _drops_spaces(stored: Mapping[str, Any], texts: Sequence[str]) -> bool:
    added = {token["content"]: bool(token["rstrip"]) for token in stored.get("added_tokens", [])}
    known = {"</s>", *_KEEP_SPACES} <= set(texts)
    return known and all(dropped == (text not in _KEEP_SPACES) for text, dropped in added.items())


def _split(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """The pre-tokenizers: a regular expression by its text, others by their type."""
    first = stored.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first] if first else [])
    # A ByteLevel that splits too is the one of GPT-2.
    return tuple(str(step.get("pattern", {}).get("Regex", step["type"])) for step in steps)


def _tokens(stored: Mapping[str, Any], rows: int, *, by_bytes: bool) -> _Tokens:
    """Every row's token. Raises UnsupportedError for more tokens than rows."""
    model, added = stored["model"], {token["id"]: token for token in stored.get("added_tokens", [])}
    names = {index: text for text, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    if names and max(names) >= rows:
        raise UnsupportedError(f"the tokenizer has a token {max(names)}, and the model's embedding table has {rows} rows")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    tokens = _Tokens([names.get(index, f"[PAD{index}]") for index in range(rows)], [])
    for index, text in enumerate(tokens.texts):
        tokens.types.append(_type(text, index in names, added.get(index), model.get("unk_token"), by_bytes=by_bytes))
    if by_bytes:
        scores = _scores(merges)
        tokens.scores.extend(
            scores.get(text, -1000.0 * (len(merges) + 1) if index in added else 0.0) for index, text in enumerate(tokens.texts)
        )
    else:
        tokens.merges.extend(" ".join(pair) for pair in merges)
    return tokens


def _type(text: str, known: bool, added: Mapping[str, Any] | None, unknown: str | None, *, by_bytes: bool) -> int:
    if not known:
        return _UNUSED
    if text == unknown:
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    return _BYTE_TOKEN if by_bytes and _BYTE.fullmatch(text) else _NORMAL


def _scores(merges: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """The merge scores of SentencePiece: the piece that is merged first has the highest score."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank + 1))
    return scores
