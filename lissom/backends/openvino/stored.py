"""Checks of an artifact's IR, which is untrusted, before OpenVINO opens it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from lissom.errors import ArtifactError

_OPSET = re.compile(r"opset[0-9]{1,2}")
_SECTIONS = {"layers", "edges", "rt_info"}
_DECLARATIONS = ("<!DOCTYPE", "<!ENTITY")


def check_stored(path: Path, weights: Path) -> None:
    """Refuse IR with document types, operators outside OpenVINO's opsets, or constants beyond the file of weights.

    Raises:
        ArtifactError: if it has any of these, or cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        size = weights.stat().st_size
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}; compile the model again") from error
    # Python's parser would expand entities that a document type declares.
    if any(declaration in text for declaration in _DECLARATIONS):
        raise ArtifactError(f"'{path}' declares a document type, and no artifact does; compile the model again")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ArtifactError(f"'{path}' is not XML: {error}; compile the model again") from error
    if root.tag != "net" or {section.tag for section in root} - _SECTIONS:
        raise ArtifactError(f"'{path}' is not OpenVINO's IR; compile the model again")
    for layer in root.iter("layer"):
        name, kind, opset = (layer.get(key, "") for key in ("name", "type", "version"))
        if not _OPSET.fullmatch(opset):
            raise ArtifactError(
                f"'{path}' holds the operator {opset:.40}.{kind:.40} in '{name:.80}', which no artifact has; "
                f"compile the model again"
            )
        for offset, length in _places(layer) if kind == "Const" else ():
            if not 0 <= offset <= offset + length <= size:
                raise ArtifactError(
                    f"'{path}' reads {length} bytes from {offset} of {weights.name} for '{name:.80}', which has {size}; "
                    f"compile the model again"
                )


def _places(layer: ElementTree.Element) -> Iterator[tuple[int, int]]:
    """The offsets and sizes that a constant reads; one that is no number lies before every file."""
    for data in layer.findall("data"):
        try:
            yield int(data.get("offset", "")), int(data.get("size", ""))
        except ValueError:
            yield -1, 0
