"""A file of token ids or tokens, one per line."""

from __future__ import annotations

from pathlib import Path

from lissom.errors import InputError
from lissom.io.fields import shown
from lissom.io.files import read_plain
from lissom.passes.prune.prune_vocabulary.stored_tokenizer import StoredTokenizer

_MOST_BYTES = 64 << 20


def read_tokens(name: str, size: int, tokenizer: StoredTokenizer | None) -> set[int]:
    """The ids that a file names: a line of digits is an id, any other line a token as the tokenizer writes it.

    Args:
        size: the number of ids.

    Raises:
        InputError: naming the line, if the file is missing or no text, or names an id or a token that the model has not.
    """
    path = Path(name)
    if not path.is_file():
        raise InputError(f"prune-vocabulary{{tokens=}}: there is no file '{name}'; name a file with an id or a token per line")
    raw = read_plain(path, _MOST_BYTES, links=True)
    if len(raw) > _MOST_BYTES:
        raise InputError(f"'{name}' is larger than {_MOST_BYTES >> 20} MB; give a file with an id or a token per line")
    try:
        lines = raw.decode().splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"'{name}' is no text in UTF-8 ({error.reason} at byte {error.start}); save it as such") from error
    ids = set[int]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            ids.add(_id_of(line, f"'{name}', line {number}", size, tokenizer))
    return ids


def _id_of(line: str, where: str, size: int, tokenizer: StoredTokenizer | None) -> int:
    stripped = line.strip()
    if stripped.isascii() and stripped.isdigit():
        if len(stripped) > 12 or int(stripped) >= size:
            raise InputError(f"{where}: the id {stripped[:20]} is outside the vocabulary; it has 0 to {size - 1}")
        return int(stripped)
    if tokenizer is None:
        raise InputError(f"{where}: {shown(line)} is no id, and there is no tokenizer to look it up; give tokenizer=FOLDER")
    index = tokenizer.ids.get(line, tokenizer.ids.get(stripped))
    if index is None or index >= size:
        raise InputError(f"{where}: the tokenizer has no token {shown(line)}; give ids, or tokens as tokenizer.json has them")
    return index
