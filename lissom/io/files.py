"""Single files: only regular files are opened, targets are checked early, and files are written completely or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import BinaryIO

from lissom.errors import ArtifactError

PART = 1 << 20
"""Bytes copied at a time."""


def open_plain(path: Path, *, links: bool = False) -> BufferedReader:
    """Open a file for reading. Only a regular file is opened: a link may lead anywhere, and a pipe may block forever.

    Args:
        links: follow links, as in the cache of the Hugging Face Hub; they too lead to a regular file.

    Raises:
        ArtifactError: if it is another kind of file, or cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | (0 if links else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise ArtifactError(f"there is no file '{path}'; copy the artifact whole, or save again") from error
        kinds = {errno.ELOOP: "is a symbolic link", errno.ENXIO: "is not a regular file"}
        if error.errno not in kinds:
            raise ArtifactError(f"'{path}' cannot be read: {error.strerror}") from error
        raise ArtifactError(
            f"'{path}' {kinds[error.errno]}; an artifact holds regular files only: copy the file itself"
        ) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArtifactError(f"'{path}' is not a regular file; an artifact holds regular files only: copy the file itself")
    return os.fdopen(handle, "rb")


def read_plain(path: Path, most: int, *, links: bool = False) -> bytes:
    """The content of a regular file, at most `most` + 1 bytes.

    Args:
        links: as for `open_plain`.

    Raises:
        ArtifactError: as `open_plain`, or if it cannot be read.
    """
    with open_plain(path, links=links) as file:
        try:
            return file.read(most + 1)
        except OSError as error:
            raise ArtifactError(f"'{path}' cannot be read: {error.strerror}") from error


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy at most so many bytes, a part at a time: the file may grow meanwhile. Raises OSError."""
    while size and (part := source.read(min(size, PART))):
        size -= target.write(part)


def check_parent(path: Path) -> None:
    """Refuse a path whose directory is missing or not writable. Raises ArtifactError, OSError, ValueError."""
    if not path.parent.is_dir():
        raise ArtifactError(f"'{path}' cannot be written: there is no directory '{path.parent}'; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"'{path}' cannot be written: '{path.parent}' takes no new files; choose another directory")


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written, or is not a regular file, before any work is done. Raises ArtifactError."""
    try:
        check_parent(path)
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    # A name with a zero byte raises ValueError.
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path}' cannot be written: {reason(error)}; choose another name") from error
    if stat.S_ISDIR(mode):
        raise ArtifactError(f"'{path}' cannot be written: it is a directory; name a file in it")
    if stat.S_ISLNK(mode):
        raise ArtifactError(f"'{path}' is a symbolic link, and would be replaced; name the file itself")
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"'{path}' is a device, a pipe or a socket, and would be replaced; name a regular file")


def reason(error: OSError | ValueError) -> str:
    """The message of a system error, without its number and file."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@contextmanager
def writing_whole(path: Path) -> Generator[BufferedWriter]:
    """A new file that replaces `path` when the block ends, completely or not at all.

    It is written in the same folder under an unpredictable name that must not exist before.

    Raises:
        ArtifactError: as `check_writable`, or if it cannot be written.
    """
    path = path.absolute()
    check_writable(path)
    # Without the name of `path`, which may have the maximum length already.
    temporary = path.with_name(f".lissom-{secrets.token_hex(8)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_writable(path)
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"'{path}' cannot be written: {reason(error)}; what was there before is unchanged: "
            f"make room, or choose another directory"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, content: str) -> None:
    """Write a text file as `writing_whole` does."""
    with writing_whole(path) as file:
        file.write(content.encode())


def check_path(path: str | os.PathLike[str]) -> Path:
    """The path, if the system can look it up, whether or not it exists. Raises ArtifactError."""
    if not isinstance(path, (str, os.PathLike)):
        raise ArtifactError(f"the directory is {path!r:.80}; give a path, as text or as pathlib.Path")
    try:
        Path(path).lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{path!s:.80}' cannot be looked up: {reason(error)}; give another path") from error
    return Path(path)
