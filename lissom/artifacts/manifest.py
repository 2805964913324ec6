"""The manifest of an artifact: its metadata, the environment that made it, and the size and hash of every other file.

Its last field is a hash of all the text before it, which detects changes to the manifest itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lissom.errors import ArtifactError
from lissom.io.fields import MOST_BYTES, count, fields_of, number, parse_json, printable, shown, take, take_list, text
from lissom.io.files import read_plain
from lissom.io.hashes import hash_ranges

MODEL_TYPE = "lissom"
"""The model type in the configuration of a saved model."""
NAME = "manifest.json"
KIND = "lissom artifact"
FORMAT_VERSION = 2
PART_BYTES = 16 << 20
"""The size of the parts of a large file that are hashed one by one."""


@dataclass(frozen=True)
class Content:
    """One file's size in bytes and SHA-256.

    Attributes:
        parts: the SHA-256 of every `PART_BYTES` of a larger file, which several threads check at once; empty in an artifact
            without them.
    """

    size: int
    sha256: str
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: Path) -> Content:
        """Size and hashes of a file. Raises OSError."""
        size = path.stat().st_size
        with path.open("rb") as file:
            whole, *parts = hash_ranges(file.fileno(), [range(size), *(_parts(size) if size > PART_BYTES else ())])
        return cls(size, whole, tuple(parts))

    @classmethod
    def of_bytes(cls, content: bytes) -> Content:
        return cls(len(content), sha256(content).hexdigest())

    def is_of(self, handle: int) -> bool:
        """True if an open file of this size has these hashes. Raises OSError."""
        wanted = self.parts or (self.sha256,)
        return hash_ranges(handle, _parts(self.size) if self.parts else [range(self.size)]) == [*wanted]

    def is_of_bytes(self, content: bytes) -> bool:
        """True if the bytes have this size and hash."""
        return Content.of_bytes(content) == Content(self.size, self.sha256)


def _parts(size: int) -> Sequence[range]:
    """The parts of a file that are hashed one by one."""
    return [range(start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


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
    files = {name: _encode_content(content) for name, content in manifest.files.items()}
    fields = {"kind": KIND, "version": FORMAT_VERSION, **vars(manifest), "files": files}
    body = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    path.write_bytes(body + _seal(body))


def _seal(body: bytes) -> bytes:
    return f',\n "sha256": "{sha256(body).hexdigest()}"\n}}\n'.encode()


def _encode_content(content: Content) -> dict[str, object]:
    """The size and hashes of a file as JSON."""
    return {"size": content.size, "sha256": content.sha256, **({"parts": content.parts} if content.parts else {})}


def _decode_content(data: object) -> Content:
    """The size and hashes of a file from JSON. Raises ValueError for anything `_encode_content` does not write."""
    size, whole = count(take(data, "size", int)), take(data, "sha256", str)
    parts = take_list(data, "parts", text) if "parts" in fields_of(data) else ()
    if parts and len(parts) != len(_parts(size)):
        raise ValueError(f"a file of {size} bytes has {len(parts)} hashes, one for every {PART_BYTES} bytes")
    return Content(size, whole, parts)


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
            files={name: _decode_content(entry) for name, entry in take(data, "files", dict).items()},
        )
    except ValueError as error:
        raise ArtifactError(f"'{path}' is not a Lissom manifest: {error}; save the model again") from error


def _option(data: object) -> object:
    is_float = isinstance(data, float) and math.isfinite(data)
    return number(data) if isinstance(data, (int, float)) and not isinstance(data, bool) and not is_float else data
