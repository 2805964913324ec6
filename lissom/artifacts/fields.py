"""JSON as it comes from a file: text to values, and fields of a kind, with an error that says what was found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from lissom.compiler.errors import ArtifactError

Kind = TypeVar("Kind")
Item = TypeVar("Item")

_LONGEST = 60


def take(data: object, key: str, kind: type[Kind]) -> Kind:
    """The field of a JSON object.

    Raises: ValueError when it is missing, or of another kind.
    """
    if not isinstance(data, dict) or key not in data:
        raise ValueError(f"there is no field '{key}' in {shown(data)}")
    value = cast("dict[str, object]", data)[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise ValueError(f"the field '{key}' is {shown(value)}, which is no {kind.__name__}")
    return value


def take_list(data: object, key: str, read: Callable[[object], Item]) -> tuple[Item, ...]:
    """The items of a field that holds a list, each read by a function. Raises: ValueError as `take`."""
    return tuple(read(item) for item in cast("list[object]", take(data, key, list)))


def take_text(data: object, key: str) -> str:
    """A field that may be left out where it is empty. Raises: ValueError when it is no text."""
    return take(data, key, str) if isinstance(data, dict) and key in data else ""


def text(data: object) -> str:
    """The item, which must be text. Raises: ValueError."""
    if not isinstance(data, str):
        raise ValueError(f"{shown(data)} is no text")
    return data


def number(data: object) -> int:
    """The item, which must be a whole number. Raises: ValueError."""
    if not isinstance(data, int) or isinstance(data, bool):
        raise ValueError(f"{shown(data)} is no whole number")
    return data


def shown(data: object) -> str:
    """The beginning of a value, for an error."""
    whole = repr(data)
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}…"


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises: ArtifactError when it cannot be read, or is no JSON.
    """
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}") from error


def parse_json(content: bytes, path: Path) -> Any:
    """The JSON that was read from a file. Raises: ArtifactError when it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"'{path}' holds no JSON that can be read ({error}); save the model again") from error
