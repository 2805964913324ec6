"""An artifact's directory: written beside its place and exchanged with it; read only when every byte is as it was written."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from lissom.artifacts.fields import MOST_BYTES
from lissom.artifacts.files import check_parent, open_plain, read_plain, reason, writing_whole
from lissom.artifacts.manifest import NAME, Content, Manifest, listed_files, parse_manifest
from lissom.artifacts.signature import SIGNATURE, check_signature, sign
from lissom.errors import ArtifactError

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EXCHANGE, _HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD of Linux."""


def is_artifact(path: str | Path) -> bool:
    """True for a directory with a manifest in it; whether it can be read is another question."""
    try:
        return (Path(path) / NAME).is_file()
    # A name that is too long, or a folder that may not be entered.
    except OSError:
        return False


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory, and put it in the place of `target`.

    An error, an interrupt, a full disk or the end of the process on the way leaves what was at `target`, or nothing. Where an
    artifact is there already, the system exchanges the two in one step. Where it cannot, two renames do, and a process killed
    between them leaves the old artifact beside, under a hidden name that ends in `.old`. What killed processes left is deleted
    by the next one that writes `target`.

    Raises: ArtifactError when `target` is something else than an artifact, or cannot be written.
    """
    target = target.absolute()
    check_target(target)
    fresh, old = (target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}.{word}") for word in ("new", "old"))
    lock = None
    try:
        _delete_left_over(target)
        fresh.mkdir()
        lock = _lock(fresh)
        write(fresh)
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        # Writing may have taken minutes.
        check_target(target)
        _exchange(target, fresh, old)
        _flush(target.parent)
    except OSError as error:
        raise ArtifactError(
            f"'{target}' cannot be written: {reason(error)}; what was there before is unchanged: "
            f"make room, or choose another directory"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_target(target: Path) -> None:
    """Refuse a place where no artifact can be put. Raises: ArtifactError."""
    target = target.absolute()
    try:
        if not target.name:
            raise ArtifactError(f"'{target}' is no name for an artifact; name a directory that is not there yet")
        check_parent(target)
        mode = target.lstat().st_mode
        found = {path.name for path in target.iterdir()} if stat.S_ISDIR(mode) else set[str]()
    except FileNotFoundError:
        return
    # A name with a zero byte is a ValueError.
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{target}' cannot be written: {reason(error)}; choose another directory") from error
    if stat.S_ISLNK(mode):
        raise ArtifactError(f"'{target}' is a symbolic link, and would be replaced; name the directory itself")
    if not stat.S_ISDIR(mode) or (found and NAME not in found):
        raise ArtifactError(f"'{target}' exists and is no artifact, so it is not replaced; choose another directory")
    if found:
        _check_only_ours(target, found)


def _check_only_ours(target: Path, found: Collection[str]) -> None:
    """Refuse to replace a directory with a manifest of something else, or with files beside the artifact's."""
    try:
        others = sorted({*found} - {NAME, SIGNATURE} - listed_files(target / NAME))
    except ArtifactError as error:
        raise ArtifactError(f"'{target}' exists and is no artifact, so it is not replaced; choose another directory") from error
    if others:
        raise ArtifactError(
            f"'{target}' holds '{others[0]}' beside the artifact's own files, so it is not replaced; "
            f"take it out, or choose another directory"
        )


def _prefix(target: Path) -> str:
    """How the hidden names beside a target begin. Not with its own name, which may be as long as names can be."""
    return f".lissom-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _lock(folder: Path) -> int:
    """A handle that marks a directory as one that is being written, until it is closed or the process ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    # File systems without locks keep what a killed process leaves.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _delete_left_over(target: Path) -> None:
    """Delete what processes that were killed left beside the target. Raises: OSError."""
    kinds = (".new", ".old") if target.exists() else (".new",)
    for path in [path for path in target.parent.iterdir() if path.name.startswith(_prefix(target))]:
        if not path.name.endswith(kinds) or path.is_symlink() or not path.is_dir():
            continue
        # Gone, another user's, or locked by the process that writes it.
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(handle)


def _set_aside(target: Path) -> Path | None:
    """The artifact that a process killed between two renames left beside its place. Raises: OSError."""
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return next((path for path in beside if path.name.startswith(_prefix(target)) and path.name.endswith(".old")), None)


def _exchange(target: Path, fresh: Path, old: Path) -> None:
    """Put `fresh` in the place of `target`; what was there is then at `fresh` or at `old`."""
    if not target.exists():
        fresh.rename(target)
        return
    if _exchange_at_once(target, fresh):
        return
    try:
        target.rename(old)
        fresh.rename(target)
    # An interrupt may come between the two.
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _exchange_at_once(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system has none. Raises: OSError."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _flush(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before they are relied on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_directory(
    directory: Path,
    passed_over: Callable[[Manifest], Collection[str]] = lambda _: frozenset[str](),
    trusted_keys: Sequence[str | Path] | None = None,
) -> Manifest:
    """The manifest of an artifact, every file of which is there, and is as it was written.

    passed_over: files that are not opened here: they do not matter, or who reads them checks them, as `verified_bytes` does.
    trusted_keys: files of public keys, one of which has signed the manifest; None asks for no signature.

    Raises: ArtifactError when the directory is no artifact, holds anything else than its manifest says, or is not signed by a
        trusted key; UnsupportedError when there is no package to check signatures with.
    """
    whole = _read_manifest(directory)
    if trusted_keys is not None:
        check_signature(whole, directory, trusted_keys)
    manifest = parse_manifest(whole, directory / NAME)
    _check_files(directory, manifest.files, passed_over(manifest))
    return manifest


def sign_directory(directory: Path, private_key: str | Path) -> None:
    """Check an artifact, and write the signature of its manifest, which holds the hashes of all other files, beside it.

    private_key: a PEM file of an Ed25519 key.

    Raises: ArtifactError when the artifact is damaged, the key cannot be read, or the signature cannot be written;
        UnsupportedError when there is no package to sign with.
    """
    whole = _read_manifest(directory)
    _check_files(directory, parse_manifest(whole, directory / NAME).files, ())
    with writing_whole(directory / SIGNATURE) as file:
        file.write(sign(whole, Path(private_key)))


def _read_manifest(directory: Path) -> bytes:
    """The bytes of the manifest, which are read once: what is checked is what is believed. Raises: ArtifactError."""
    try:
        if not directory.is_dir():
            aside = _set_aside(directory.absolute())
            hint = (
                f"a save that was killed left it as '{aside}': rename that"
                if aside
                else "name one that CompiledModel.save wrote"
            )
            raise ArtifactError(f"there is no directory '{directory}'; {hint}")
        if not os.path.lexists(directory / NAME):
            raise ArtifactError(
                f"'{directory}' is no artifact: it has no {NAME}; name a directory that CompiledModel.save wrote"
            )
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be read: {reason(error)}; name another directory") from error
    return read_plain(directory / NAME, MOST_BYTES)


def _check_files(directory: Path, files: Mapping[str, Content], unread: Collection[str]) -> None:
    """Refuse a directory that does not hold these files and no others. unread: those that are not opened."""
    _check_names(directory, files, unread)
    for name, content in files.items():
        if name not in unread:
            open_verified(directory / name, content).close()


def _check_names(directory: Path, files: Mapping[str, Content], unread: Collection[str]) -> None:
    for name in files:
        if _FILE.fullmatch(name) is None or name in (NAME, SIGNATURE):
            raise ArtifactError(
                f"'{directory / NAME}' names the file '{name}', which does not lie in the artifact's directory itself; "
                f"do not use this artifact"
            )
    found = {path.name for path in directory.iterdir()} - {NAME, SIGNATURE}
    for name in sorted(found - set(files)):
        raise ArtifactError(f"'{directory}' holds '{name}', which its manifest does not name; take it out, or save again")
    for name in sorted(set(files) - found - set(unread)):
        raise ArtifactError(f"'{directory}' lacks '{name}', which its manifest names; copy it whole, or save again")


def open_verified(path: Path, wanted: Content) -> BufferedReader:
    """A file of an artifact, open at its start, whose bytes were checked through this same handle.

    Raises: ArtifactError when it is not what the manifest says.
    """
    file = open_plain(path)
    try:
        _check_size(path, os.fstat(file.fileno()).st_size, wanted)
        if Content.of_file(file) != wanted:
            raise _changed(path)
        file.seek(0)
    except OSError as error:
        file.close()
        raise ArtifactError(f"'{path}' cannot be read: {reason(error)}") from error
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def verified_path(path: Path, wanted: Content) -> Generator[Path]:
    """A path that leads to the file that was checked until the block ends, whatever takes its name meanwhile.

    For libraries that take a path alone. Where the system has no names for open files, it is the path given.

    Raises: ArtifactError as `open_verified`.
    """
    with open_verified(path, wanted) as file:
        held = Path(f"/proc/self/fd/{file.fileno()}")
        yield held if held.exists() else path


def verified_bytes(path: Path, wanted: Content) -> bytes:
    """What a file of JSON of an artifact holds: the very bytes that were checked. Raises: ArtifactError as `open_verified`."""
    if wanted.size > MOST_BYTES:
        raise ArtifactError(f"'{path}' has {wanted.size} bytes, and {MOST_BYTES} are the most; save the model again")
    with open_plain(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, wanted)
        try:
            # One byte more, so that a file that grew is noticed, and one without end is not read.
            found = file.read(wanted.size + 1)
        except OSError as error:
            raise ArtifactError(f"'{path}' cannot be read: {reason(error)}") from error
    if Content.of_bytes(found) != wanted:
        raise _changed(path)
    return found


def _check_size(path: Path, size: int, wanted: Content) -> None:
    if size != wanted.size:
        raise ArtifactError(f"'{path}' has {size} bytes, and had {wanted.size} when written; copy it whole, or save again")


def _changed(path: Path) -> ArtifactError:
    return ArtifactError(f"'{path}' was changed after it was written: its SHA-256 is another; copy it again, or save again")
