"""Parsing of JSON files, and typed access to fields, with errors that say what was found.

A file may be malicious, so its length, nesting and numbers are limited, and duplicate keys are refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from lissom.errors import ArtifactError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind")
Item = TypeVar("Item")

MOST_BYTES = 512 << 20
"""The largest JSON file, in bytes."""
MOST_LEVELS = 100
"""The deepest nesting of lists and objects. Python's parser of source stops at 200, its stack at a thousand calls."""
_LONGEST = 60
_LONGEST_NAME = 1000
_DIGITS = len(str(-(1 << 63)))
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_BRACKETS = re.compile(r"[][{}]")


def take(data: object, key: str, kind: type[Kind]) -> Kind:
    """A field of a JSON object, checked to be of a type. Raises ValueError if it is missing, or of another type."""
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"there is no field '{key}' in {shown(data)}")
    value = data[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ValueError(f"the field '{key}' is {shown(value)}, which is not of type {kind.__name__}")
    return value


def fields_of(data: object) -> Mapping[str, object]:
    """The fields of a JSON object. Raises ValueError for anything else."""
    if not isinstance(data, dict):
        raise ValueError(f"{shown(data)} is not an object with fields")
    return data


def check_fields(data: object, kind: type[DataclassInstance], *more: str) -> None:
    """Refuse a JSON object with other fields than those of a dataclass.

    Args:
        more: names allowed too.

    Raises:
        ValueError: if there is another one.
    """
    known = {*(field.name for field in fields(kind)), *more}
    unknown = next((name for name in fields_of(data) if name not in known), None)
    if unknown is not None:
        raise ValueError(f"there is an unknown field {shown(unknown)}")


def take_list(data: object, key: str, read: Callable[[object], Item]) -> tuple[Item, ...]:
    """The items of a list field, each converted by `read`. Raises ValueError as `take`."""
    return tuple(read(entry) for entry in take(data, key, list))


def take_optional(data: object, key: str, kind: type[Kind]) -> Kind | None:
    """A field checked as by `take`; None if it is missing or null. Raises ValueError."""
    return None if fields_of(data).get(key) is None else take(data, key, kind)


def take_text(data: object, key: str) -> str:
    """A text field; a missing one is empty. Raises ValueError if it is not text."""
    return take(data, key, str) if isinstance(data, dict) and key in data else ""


def text(data: object) -> str:
    """The item as text. Raises ValueError if it is not text."""
    if not isinstance(data, str):
        raise ValueError(f"{shown(data)} is not text")
    return data


def printable(data: object) -> str:
    """The item as text without control characters. Raises ValueError if it is anything else."""
    name = text(data)
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise ValueError(f"{shown(name)} is not a name: it holds what cannot be printed, or is longer than {_LONGEST_NAME}")
    return name


def visible(words: str) -> str:
    """The text with escapes in place of control characters, marks of writing direction, and lone surrogates."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), words)


def number(data: object) -> int:
    """The item as a 64-bit integer. Raises ValueError if it is anything else."""
    if not isinstance(data, int) or isinstance(data, bool) or abs(data) >= 1 << 63:
        raise ValueError(f"{shown(data)} is not a whole number of 64 bits")
    return data


def real(data: object) -> float:
    """The item as a floating-point number. Raises ValueError if it is not a number."""
    if not isinstance(data, (int, float)) or isinstance(data, bool):
        raise ValueError(f"{shown(data)} is not a number")
    return float(data)


def optional(data: object, key: str, read: Callable[[object], Item]) -> Item | None:
    """A field converted by `read`; None if it is missing or null. Raises what `read` raises."""
    value = data.get(key) if isinstance(data, dict) else None
    return None if value is None else read(value)


def count(data: object) -> int:
    """The item as a non-negative 64-bit integer. Raises ValueError if it is anything else."""
    if number(data) < 0:
        raise ValueError(f"{shown(data)} is negative")
    return number(data)


def finite(digits: str) -> float:
    """The finite number that a text holds. Raises ValueError if it holds none."""
    value = float(digits) if len(digits) <= _LONGEST else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is not a finite number")
    return value


def shown(data: object) -> str:
    """A value's text, truncated, for an error message."""
    whole = repr(data)
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}…"


def parse_json(raw: bytes, path: Path, *, any_number: bool = False) -> Any:
    """The JSON value in the bytes of a file.

    Args:
        any_number: allow numbers that are not finite or do not fit into 64 bits.

    Raises:
        ArtifactError: if the bytes are not JSON, or exceed a limit.
    """
    try:
        if len(raw) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES} bytes")
        whole = raw.decode("utf-8")
        levels = _levels(whole)
        if levels > MOST_LEVELS:
            raise ValueError(f"its lists and objects are nested {levels} deep; the limit is {MOST_LEVELS}")
        numbers: dict[str, Any] = (
            {} if any_number else {"parse_int": _integer, "parse_float": _float, "parse_constant": _no_constant}
        )
        return json.loads(whole, object_pairs_hook=_object, **numbers)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' holds no JSON that can be read ({error}); save the model again") from error


def _levels(whole: str) -> int:
    """The deepest nesting of lists and objects."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_TEXT.sub("", whole)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the field {shown(twice)} is there twice")
    return fields


def _integer(digits: str) -> int:
    # The digits are counted first: converting very many takes long.
    if len(digits) > _DIGITS or abs(value := int(digits)) >= 1 << 63:
        raise ValueError(f"the number {shown(digits)} does not fit into 64 bits")
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shown(digits)} does not fit into 64 bits")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
