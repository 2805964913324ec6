"""The manifest of an artifact: its metadata, the environment that made it, and the size and hash of every other file.

Its last field is a hash of all the text before it, which detects changes to the manifest itself.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path

from lissom.errors import ArtifactError
from lissom.io.fields import MOST_BYTES, count, number, parse_json, printable, shown, take, text
from lissom.io.files import read_plain

MODEL_TYPE = "lissom"
"""The model type in the configuration of a saved model."""
NAME = "manifest.json"
KIND = "lissom artifact"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Content:
    """One file's size in bytes and SHA-256."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Content:
        """Size and hash of a file. Raises OSError."""
        with path.open("rb") as file:
            return cls.of_file(file)

    @classmethod
    def of_file(cls, file: BufferedReader | BufferedRandom) -> Content:
        """Size and hash of an open file, from its position to the end. Raises OSError."""
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(file.tell(), digest)

    @classmethod
    def of_bytes(cls, content: bytes) -> Content:
        return cls(len(content), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Manifest:
    """The metadata of an artifact.

    Attributes:
        name: of the program.
        options: of the backend.
        device: it was compiled for, `cpu` or `cuda:0`.
        signature: as text.
        pipeline: as text.
        history: as JSON.
        facts: the model's metadata, as JSON.
        environment: versions and processor.
        files: all other files in the directory.
    """

    name: str
    backend: str
    options: Mapping[str, object]
    device: str
    signature: str
    pipeline: str
    history: Mapping[str, object]
    facts: Mapping[str, object]
    environment: Mapping[str, str]
    files: Mapping[str, Content]

    def content_of(self, name: str, directory: Path) -> Content:
        """Size and hash of a file that every artifact has. Raises ArtifactError if the manifest does not list it."""
        if name not in self.files:
            raise ArtifactError(f"'{directory / NAME}' names no '{name}', which every artifact has; save the model again")
        return self.files[name]


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write the manifest. Raises OSError."""
    files = {name: {"size": content.size, "sha256": content.sha256} for name, content in manifest.files.items()}
    fields = {"kind": KIND, "version": FORMAT_VERSION, **vars(manifest), "files": files}
    body = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    path.write_bytes(body + _seal(body))


def _seal(body: bytes) -> bytes:
    return f',\n "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file. Raises ArtifactError as `parse_manifest`, or if the file cannot be read."""
    return parse_manifest(read_plain(path, MOST_BYTES), path)


def listed_files(path: Path) -> frozenset[str]:
    """The files listed in a manifest of any format version. Raises ArtifactError if the file is not a manifest."""
    data = parse_json(read_plain(path, MOST_BYTES), path, any_number=True)
    try:
        if take(data, "kind", str) == KIND:
            return frozenset(take(data, "files", dict))
    except ValueError:
        pass
    raise ArtifactError(f"'{path}' is not a Lissom manifest; name a directory that CompiledModel.save wrote")


def parse_manifest(whole: bytes, path: Path) -> Manifest:
    """The manifest from the bytes of a file.

    Raises:
        ArtifactError: if it is not a manifest, has an unknown version, or was changed since it was written.
    """
    # A configuration may hold infinities, and a very large length that means no limit.
    data = parse_json(whole, path, any_number=True)
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ArtifactError(f"'{path}' is not a Lissom manifest; name a directory that CompiledModel.save wrote")
    version = data.get("version")
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"'{path}' is of format version {shown(version)}, and this Lissom reads version {FORMAT_VERSION}; "
            f"install the Lissom that wrote it, or save the model again with this one"
        )
    body = whole[: -len(_seal(b""))]
    if whole != body + _seal(body):
        raise ArtifactError(f"'{path}' was changed after it was written: its SHA-256 is another; save the model again")
    try:
        return Manifest(
            **{key: take(data, key, str) for key in ("signature", "pipeline")},
            **{key: printable(take(data, key, str)) for key in ("name", "backend", "device")},
            options={key: _option(value) for key, value in take(data, "options", dict).items()},
            history=take(data, "history", dict),
            facts=take(data, "facts", dict) if "facts" in data else {},
            environment={key: text(value) for key, value in take(data, "environment", dict).items()},
            files={
                name: Content(count(take(entry, "size", int)), take(entry, "sha256", str))
                for name, entry in take(data, "files", dict).items()
            },
        )
    except ValueError as error:
        raise ArtifactError(f"'{path}' is not a Lissom manifest: {error}; save the model again") from error


def _option(data: object) -> object:
    is_float = isinstance(data, float) and math.isfinite(data)
    return number(data) if isinstance(data, (int, float)) and not isinstance(data, bool) and not is_float else data
