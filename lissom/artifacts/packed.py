"""Artifacts as other libraries keep them: packed in one file, or as links into a cache.

The file is a zip archive without compression. An artifact is read from a directory of regular files alone, so both are
copied to a temporary directory, which lives as long as the model that was loaded from it.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from lissom.artifacts.directory import check_names, check_size
from lissom.artifacts.manifest import NAME, parse_manifest
from lissom.artifacts.signature import SIGNATURE, SIGNATURE_BYTES
from lissom.errors import ArtifactError
from lissom.fields import MOST_BYTES
from lissom.files import open_plain, read_plain, reason, writing_whole
from lissom.frontends.failures import first_line

_Model = TypeVar("_Model")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PART = 1 << 20
"""The bytes that are copied at once."""


def pack(save: Callable[[Path], None], target: Path) -> None:
    """Write the directory that `save` writes as one file, completely or not at all.

    Raises: what `save` raises; ArtifactError.
    """
    with (
        writing_whole(target) as file,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".lissom-") as temporary,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        folder = Path(temporary) / "artifact"
        save(folder)
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)


def load_packed(path: Path, load: Callable[[Path], _Model]) -> _Model:
    """What `load` makes of the directory packed in a file. Raises: what `load` raises; ArtifactError for another file."""

    def unpack(folder: Path) -> None:
        with open_plain(path, links=True) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            # No entry may leave the folder, or expand to more than is in the file.
            odd = [entry.filename for entry in entries if not _NAME.fullmatch(entry.filename) or entry.compress_type]
            size = sum(entry.file_size for entry in entries)
            if odd or len(names) < len(entries) or size > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile(f"it holds {odd[0]!r:.80}" if odd else "its sizes or names are wrong")
            # A sparse file is larger than its space on the disk; the copy takes all of it.
            _check_room(folder, size, path)
            for entry in entries:
                with archive.open(entry) as source, (folder / entry.filename).open("wb") as copied:
                    shutil.copyfileobj(source, copied)

    try:
        return _from_copy(unpack, load)
    # A name that is not UTF-8 and an offset outside the file raise ValueError.
    except (OSError, EOFError, ValueError, struct.error, zipfile.BadZipFile, RuntimeError) as error:
        raise ArtifactError(f"'{path}' holds no program of Lissom: {first_line(error)}; export the model again") from error


def load_linked(directory: Path, load: Callable[[Path], _Model]) -> _Model:
    """What `load` makes of a directory, whose files may be links as in the cache of the Hugging Face Hub.

    Raises: what `load` raises; ArtifactError as `copy_linked`.
    """
    try:
        linked = any(path.is_symlink() for path in directory.iterdir())
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be read: {reason(error)}; name another directory") from error
    return _from_copy(partial(copy_linked, directory), load) if linked else load(directory)


def copy_linked(directory: Path, target: Path, *, exact: bool = True) -> None:
    """Copy an artifact whose files may be links into an empty directory, by hard links where the file system allows it.

    Only files of the manifest are read, and each is a regular file of the size in the manifest, so that no link fills the disk.
    Hashes are checked when the copy is loaded. exact: refuse additional files in the directory.

    Raises: ArtifactError if the directory differs from its manifest, or the copy does not fit on the disk.
    """
    manifest = read_plain(directory / NAME, MOST_BYTES, links=True)
    files = parse_manifest(manifest, directory / NAME).files
    check_names(directory, files, exact=exact)
    try:
        (target / NAME).write_bytes(manifest)
        if os.path.lexists(directory / SIGNATURE):
            (target / SIGNATURE).write_bytes(read_plain(directory / SIGNATURE, SIGNATURE_BYTES, links=True))
        for name, content in files.items():
            with open_plain(directory / name, links=True) as source:
                check_size(directory / name, os.fstat(source.fileno()).st_size, content)
                if not _linked(source, directory / name, target / name):
                    _check_room(target, content.size, directory / name)
                    _copy(source, target / name, content.size)
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be copied to '{target}': {reason(error)}; make room there") from error


def _check_room(folder: Path, size: int, source: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ArtifactError(f"'{source}' takes {size} bytes, and {free} are free in '{folder.parent}'; make room there")


def _linked(source: BufferedReader, path: Path, target: Path) -> bool:
    """True if `target` is now another name of the open file. path: of the file, or of a link to it."""
    with suppress(OSError):  # another file system, or one without hard links
        os.link(path.resolve(), target)
        if os.path.samestat(target.lstat(), os.fstat(source.fileno())):
            return True
        target.unlink()
    return False


def _copy(source: BufferedReader, target: Path, size: int) -> None:
    """Copy at most so many bytes: the file may grow meanwhile. Raises: OSError."""
    with target.open("xb") as copied:
        while size and (part := source.read(min(size, _PART))):
            size -= copied.write(part)


def _from_copy(fill: Callable[[Path], None], load: Callable[[Path], _Model]) -> _Model:
    """What `load` makes of a temporary directory, which is deleted with it."""
    temporary = tempfile.TemporaryDirectory(prefix="lissom-")
    try:
        fill(Path(temporary.name))
        model = load(Path(temporary.name))
    except BaseException:
        temporary.cleanup()
        raise
    weakref.finalize(model, temporary.cleanup)
    return model
