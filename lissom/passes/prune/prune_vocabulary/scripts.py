"""The Unicode scripts of tokens. Characters are told apart by their Unicode names: CYRILLIC SMALL LETTER A."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from lissom.errors import UnsupportedError
from lissom.passes.prune.prune_vocabulary.stored_tokenizer import StoredTokenizer

SCRIPTS = {
    **{name.lower(): (name,) for name in ("LATIN", "CYRILLIC", "GREEK", "ARMENIAN", "GEORGIAN", "HEBREW", "ARABIC", "SYRIAC")},
    **{name.lower(): (name,) for name in ("DEVANAGARI", "BENGALI", "GURMUKHI", "GUJARATI", "ORIYA", "TAMIL", "TELUGU")},
    **{name.lower(): (name,) for name in ("KANNADA", "MALAYALAM", "SINHALA", "THAI", "LAO", "TIBETAN", "MYANMAR", "KHMER")},
    **{name.lower(): (name,) for name in ("ETHIOPIC", "MONGOLIAN", "CHEROKEE", "THAANA", "HIRAGANA", "KATAKANA", "BOPOMOFO")},
    "han": ("CJK", "KANGXI"),
    "hangul": ("HANGUL",),
}
"""The scripts that `scripts=` takes, with the first words of the names of their characters."""
_WIDTHS = ("FULLWIDTH", "HALFWIDTH", "MODIFIER", "COMBINING")


def check_scripts(text: str) -> tuple[str, ...]:
    """The scripts in a list with commas. Raises UnsupportedError for one that is not known."""
    names = tuple(name.strip().lower() for name in text.split(",")) if text else ()
    wrong = next((name for name in names if name not in SCRIPTS), None)
    if wrong is not None:
        raise UnsupportedError(f"prune-vocabulary knows no script '{wrong:.40}'; allowed are {', '.join(sorted(SCRIPTS))}")
    return names


def ids_in_scripts(text: str, tokenizer: StoredTokenizer, size: int) -> set[int]:
    """The ids whose text has letters of these scripts only; numbers, signs and spaces belong to every script.

    Parts of a character, which are no text alone, are in no script.
    """
    names = tuple(name for script in check_scripts(text) for name in SCRIPTS[script])
    return {index for index in tokenizer.names if index < size and is_written_in(tokenizer.text_of(index), names)}


def is_written_in(text: str, names: tuple[str, ...]) -> bool:
    """True if all letters of a text have names that begin with one of these words."""
    return "\N{REPLACEMENT CHARACTER}" not in text and all(_script_of(character) in (*names, "") for character in text)


@lru_cache(maxsize=1 << 16)
def _script_of(character: str) -> str:
    """The first word of a letter's name; empty for what is no letter, and for marks that all scripts share."""
    if unicodedata.category(character)[0] not in "LM":
        return ""
    words = unicodedata.name(character, "UNNAMED").split()
    if words[0] in _WIDTHS:
        words = [word for word in words if any(word in names for names in SCRIPTS.values())]
    return words[0].partition("-")[0] if words else ""
