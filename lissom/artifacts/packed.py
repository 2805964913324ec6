"""Artifacts as other libraries keep them: packed in one file, or as links into a cache.

The file is a zip archive without compression. An artifact is read from a directory of regular files alone, so both are
copied to a temporary directory, which lives as long as the model that was loaded from it.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import TypeVar

from lissom.artifacts.directory import check_names, check_size, is_file_name, verify
from lissom.artifacts.manifest import NAME, Content, parse_manifest
from lissom.artifacts.signature import SIGNATURE, SIGNATURE_BYTES
from lissom.errors import ArtifactError, LissomError
from lissom.frontends.capture.failures import first_line
from lissom.io.fields import MOST_BYTES
from lissom.io.files import PART, copy_bytes, open_plain, read_plain, reason, writing_whole

_Model = TypeVar("_Model")
_MOST_FILES = 4096
_MOST_LISTED = 4 << 20
"""The bytes that the list of the files in an archive takes at most; 4,096 names of 255 bytes are less."""


def pack(save: Callable[[Path], None], target: Path) -> None:
    """Write the directory that `save` writes as one file, completely or not at all. The same files give the same bytes.

    Errors of `save` pass through.

    Raises:
        ArtifactError: if the file cannot be written.
    """
    with (
        writing_whole(target) as file,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".lissom-") as temporary,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        folder = Path(temporary) / "artifact"
        save(folder)
        for path in sorted(folder.iterdir()):
            with path.open("rb") as source, archive.open(zipfile.ZipInfo(path.name), "w", force_zip64=True) as packed:
                shutil.copyfileobj(source, packed, PART)


def load_packed(path: Path, load: Callable[[Path], _Model], wanted: Content | None = None) -> _Model:
    """The result of `load` on the directory packed in a file.

    Errors of `load` pass through.

    Args:
        wanted: size and hash of the file, if they are known.

    Raises:
        ArtifactError: for another file, or without room for a copy.
    """
    return from_copy(partial(_unpack, path, wanted), load, path)


class _Archive(BufferedReader):
    """A file that says itself how long the list of its parts is, which is read at once."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_LISTED:
            raise zipfile.BadZipFile("its list of files is too long")
        return super().read(size)


def _unpack(path: Path, wanted: Content | None, folder: Path) -> None:
    """Copy the files packed in a file into a folder. Raises ArtifactError."""
    try:
        opened = open_plain(path, links=True) if wanted is None else _private(path, wanted)
        with _Archive(opened.detach()) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            # No entry may leave the folder, or expand to more than is in the file.
            odd = [entry.filename for entry in entries if not is_file_name(entry.filename) or entry.compress_type]
            size = sum(entry.file_size for entry in entries)
            if len(entries) > _MOST_FILES:
                raise zipfile.BadZipFile(f"it holds {len(entries)} files, and {_MOST_FILES} are the most")
            if odd or len(names) < len(entries) or size > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile(f"it holds {odd[0]!r:.80}" if odd else "its sizes or names are wrong")
            # A sparse file is larger than its space on the disk; the copy takes all of it.
            _check_room(folder.parent, size, path)
            for entry in entries:
                with archive.open(entry) as source, (folder / entry.filename).open("wb") as copied:
                    shutil.copyfileobj(source, copied)
    # A name that is not UTF-8 and an offset outside the file raise ValueError, and a huge length the two after it.
    except (EOFError, ValueError, OverflowError, MemoryError, struct.error, zipfile.BadZipFile, RuntimeError) as error:
        raise _no_program(path, error) from error
    except OSError as error:
        # So the system calls an offset before the file.
        if error.errno == errno.EINVAL:
            raise _no_program(path, error) from error
        raise ArtifactError(
            f"'{path}' cannot be copied to a folder in '{folder.parent}': {reason(error)}; make room there"
        ) from error


def _no_program(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"'{path}' holds no program of Lissom: {first_line(error)}; export the model again")


def _private(path: Path, wanted: Content) -> BufferedRandom:
    """A checked copy of a file, without a name, so that no other process changes it after the check.

    Raises:
        ArtifactError: if the file has other content, or cannot be copied.
        OSError: if it cannot be read, or there is no temporary file.
    """
    copied = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        with open_plain(path) as source:
            check_size(path, os.fstat(source.fileno()).st_size, wanted)
            _check_room(Path(tempfile.gettempdir()), wanted.size, path)
            copy_bytes(source, copied, wanted.size)
        copied.seek(0)
        verify(copied, path, wanted)
    except BaseException:
        copied.close()
        raise
    return copied


def load_linked(directory: Path, load: Callable[[Path], _Model]) -> _Model:
    """The result of `load` on a directory whose files may be links, as in the cache of the Hugging Face Hub.

    Errors of `load` pass through.

    Raises:
        ArtifactError: as `copy_linked`, or if the directory cannot be read.
    """
    try:
        linked = any(path.is_symlink() for path in directory.iterdir())
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be read: {reason(error)}; name another directory") from error
    return from_copy(partial(copy_linked, directory), load, directory) if linked else load(directory)


def copy_linked(directory: Path, target: Path, *, exact: bool = True, place: Path | None = None) -> None:
    """Copy an artifact whose files may be links into an empty directory, by hard links where the file system allows it.

    Only files of the manifest are read, and each is a regular file of the size in the manifest, so that no link fills the disk.
    Hashes are checked when the copy is loaded.

    Args:
        exact: refuse additional files in the directory.
        place: the directory that errors name; by default the one with `target`.

    Raises:
        ArtifactError: if the directory differs from its manifest, or the copy does not fit on the disk.
    """
    place = target.parent if place is None else place
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
                    _check_room(place, content.size, directory / name)
                    with (target / name).open("xb") as copied:
                        copy_bytes(source, copied, content.size)
    except OSError as error:
        raise ArtifactError(
            f"'{directory}' cannot be copied to a folder in '{place}': {reason(error)}; make room there"
        ) from error


def _check_room(place: Path, size: int, source: Path) -> None:
    free = shutil.disk_usage(place).free
    if size > free:
        raise ArtifactError(f"'{source}' takes {size} bytes, and {free} are free in '{place}'; make room there")


def _linked(source: BufferedReader, path: Path, target: Path) -> bool:
    """True if `target` is now another name of the open file.

    Args:
        path: of the file, or of a link to it.
    """
    with suppress(OSError):  # another file system, or one without hard links
        os.link(path.resolve(), target)
        if os.path.samestat(target.lstat(), os.fstat(source.fileno())):
            return True
        target.unlink()
    return False


def from_copy(fill: Callable[[Path], None], load: Callable[[Path], _Model], source: Path | None = None) -> _Model:
    """The result of `load` on a temporary directory, which `fill` writes and which is deleted with the result.

    Errors of `fill` and `load` pass through.

    Args:
        source: what was copied; errors of `load` name it in place of the directory.

    Raises:
        ArtifactError: without a directory for temporary files, or room in it.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="lissom-"))
            fill(Path(folder))
        except OSError as error:
            raise ArtifactError(
                f"there is no room for a copy of the model: {reason(error)}; set TMPDIR to a directory with room"
            ) from error
        try:
            model = load(Path(folder))
        except LissomError as error:
            if source is not None:
                error.args = (str(error).replace(folder, str(source)),)
            raise
        weakref.finalize(model, stack.pop_all().close)
    return model
