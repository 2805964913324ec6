"""The directory of an artifact: replaced atomically when written, and verified by hashes when read."""

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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from io import BufferedRandom, BufferedReader
from pathlib import Path

from lissom.artifacts.manifest import NAME, Content, Manifest, listed_files, parse_manifest
from lissom.artifacts.signature import SIGNATURE, check_signature, sign
from lissom.errors import ArtifactError
from lissom.io.fields import MOST_BYTES, shown
from lissom.io.files import check_parent, open_plain, read_plain, reason, writing_whole
from lissom.io.hashes import submitted

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
_EXCHANGE, _HERE = 2, -100
"""RENAME_EXCHANGE and AT_FDCWD on Linux."""


def is_file_name(name: str) -> bool:
    """True for a name that a file of an artifact may have, which leads into no other directory."""
    return _FILE.fullmatch(name) is not None


def is_artifact(path: str | Path) -> bool:
    """True for a directory with a manifest; its content is not checked."""
    try:
        return (Path(path) / NAME).is_file()
    # A name that is too long, or a folder without permission.
    except OSError:
        return False


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory, then move it to `target`.

    After an error, an interrupt, a full disk or the end of the process, `target` is unchanged. An existing artifact is
    exchanged in one step if the system supports it. If not, two renames replace it, and a process killed between them leaves
    the old artifact in the same folder under a hidden name that ends in `.old`. The next process that writes `target` deletes
    what killed processes left.

    Raises:
        ArtifactError: if `target` is something else than an artifact, or cannot be written.
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
        # Again, because writing may have taken minutes.
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
    """Refuse a path where an artifact cannot be written. Raises ArtifactError."""
    target = target.absolute()
    try:
        if not target.name:
            raise ArtifactError(f"'{target}' is not a name for an artifact; name a new directory")
        check_parent(target)
        mode = target.lstat().st_mode
        file_names = {path.name for path in target.iterdir()} if stat.S_ISDIR(mode) else set[str]()
    except FileNotFoundError:
        return
    # A name with a zero byte raises ValueError.
    except (OSError, ValueError) as error:
        raise ArtifactError(f"'{target}' cannot be written: {reason(error)}; choose another directory") from error
    if stat.S_ISLNK(mode):
        raise ArtifactError(f"'{target}' is a symbolic link, and would be replaced; name the directory itself")
    if not stat.S_ISDIR(mode) or (file_names and NAME not in file_names):
        raise ArtifactError(f"'{target}' exists and is not an artifact, so it is not replaced; choose another directory")
    if file_names:
        _check_only_ours(target, file_names)


def check_new(target: Path) -> None:
    """Refuse a path where a new directory cannot be written that is no artifact. Raises ArtifactError."""
    check_target(target)
    if is_artifact(target):
        raise ArtifactError(f"'{target}' holds a compiled model, which would be replaced; choose another directory")


def _check_only_ours(target: Path, file_names: Collection[str]) -> None:
    """Refuse to replace a directory whose manifest is not Lissom's, or that holds other files than the artifact's."""
    try:
        others = sorted({*file_names} - {NAME, SIGNATURE} - listed_files(target / NAME))
    except ArtifactError as error:
        raise ArtifactError(
            f"'{target}' exists and is not an artifact, so it is not replaced; choose another directory"
        ) from error
    if others:
        raise ArtifactError(
            f"'{target}' holds '{others[0]}' besides the artifact's own files, so it is not replaced; "
            f"take it out, or choose another directory"
        )


def _prefix(target: Path) -> str:
    """The prefix of temporary names for a target. A hash, because the target's name may have the maximum length already."""
    return f".lissom-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _lock(folder: Path) -> int:
    """Lock a directory while it is written; the lock ends when the returned handle is closed or the process ends."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    # On file systems without locks, directories left by killed processes are not deleted.
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _delete_left_over(target: Path) -> None:
    """Delete the temporary directories of the target that killed processes left. Raises OSError."""
    kinds = (".new", ".old") if target.exists() else (".new",)
    for path in [path for path in target.parent.iterdir() if path.name.startswith(_prefix(target))]:
        if not path.name.endswith(kinds) or path.is_symlink() or not path.is_dir():
            continue
        # It may be gone, another user's, or locked by the process that writes it.
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(handle)


def _set_aside(target: Path) -> Path | None:
    """The old artifact that a process killed between two renames left, or None. Raises OSError."""
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return next((path for path in beside if path.name.startswith(_prefix(target)) and path.name.endswith(".old")), None)


def _exchange(target: Path, fresh: Path, old: Path) -> None:
    """Move `fresh` to `target`; a former artifact is then at `fresh` or at `old`."""
    if not target.exists():
        fresh.rename(target)
        return
    if _exchange_at_once(target, fresh):
        return
    try:
        target.rename(old)
        fresh.rename(target)
    # BaseException, because an interrupt may come between the two renames.
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _exchange_at_once(one: Path, other: Path) -> bool:
    """Exchange two names atomically; False if the system or the file system does not support it. Raises OSError."""
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
    """Flush a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_directory(
    directory: Path,
    passed_over: Callable[[Manifest], Collection[str]] = lambda _: frozenset[str](),
    trusted_keys: Sequence[Path] | None = None,
) -> Manifest:
    """The manifest of an artifact, after checking that every file is present and unchanged.

    Args:
        passed_over: files not opened here, because they are not needed, or are checked when read, as by `verified_bytes`.
        trusted_keys: files of public keys, one of which must have signed the manifest; None requires no signature.

    Raises:
        ArtifactError: if the directory is not an artifact, differs from its manifest, or is not signed by a trusted key.
        UnsupportedError: if the package to check signatures is missing.
    """
    whole = _read_manifest(directory)
    if trusted_keys is not None:
        check_signature(whole, directory, trusted_keys)
    manifest = parse_manifest(whole, directory / NAME)
    _check_files(directory, manifest.files, passed_over(manifest))
    return manifest


def sign_directory(directory: Path, private_key: str | Path) -> None:
    """Check an artifact, and write the signature of its manifest, which holds the hashes of all other files.

    Args:
        private_key: a PEM file of an Ed25519 key.

    Raises:
        ArtifactError: if the artifact is damaged, the key cannot be read, or the signature cannot be written.
        UnsupportedError: if the package to sign with is missing.
    """
    whole = _read_manifest(directory)
    _check_files(directory, parse_manifest(whole, directory / NAME).files, ())
    with writing_whole(directory / SIGNATURE) as file:
        file.write(sign(whole, Path(private_key)))


def _read_manifest(directory: Path) -> bytes:
    """The bytes of the manifest, read once, so that the checked bytes are the ones used. Raises ArtifactError."""
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
                f"'{directory}' is not an artifact: it has no {NAME}; name a directory that CompiledModel.save wrote"
            )
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be read: {reason(error)}; name another directory") from error
    return read_plain(directory / NAME, MOST_BYTES)


def _check_files(directory: Path, files: Mapping[str, Content], unread: Collection[str]) -> None:
    """Refuse a directory that does not hold exactly these files.

    Args:
        unread: those that are not opened.
    """
    check_names(directory, files, unread)
    for name, content in files.items():
        if name not in unread:
            open_verified(directory / name, content).close()


def check_names(directory: Path, files: Mapping[str, Content], unread: Collection[str] = (), *, exact: bool = True) -> None:
    """Refuse a directory that lacks one of the files, or names one outside it.

    Args:
        unread: files that may be missing.
        exact: refuse additional files too.

    Raises:
        ArtifactError: if it does, or cannot be read.
    """
    for name in files:
        if not is_file_name(name) or name in (NAME, SIGNATURE):
            raise ArtifactError(
                f"'{directory / NAME}' names the file {shown(name)}, which is not in the artifact's directory itself; "
                f"do not use this artifact"
            )
    try:
        file_names = {path.name for path in directory.iterdir()} - {NAME, SIGNATURE}
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be read: {reason(error)}; name another directory") from error
    if exact and (additional := file_names - set(files)):
        raise ArtifactError(
            f"'{directory}' holds {shown(min(additional))}, which its manifest does not name; take it out, or save again"
        )
    for name in sorted(set(files) - file_names - set(unread)):
        raise ArtifactError(f"'{directory}' lacks '{name}', which its manifest names; copy it whole, or save again")


def open_verified(path: Path, wanted: Content) -> BufferedReader:
    """A file of an artifact, open at its start, whose hash was checked through this same handle.

    Raises:
        ArtifactError: if it differs from the manifest.
    """
    file = open_plain(path)
    try:
        verify(file, path, wanted)
    except BaseException:
        file.close()
        raise
    return file


def verify(file: BufferedReader | BufferedRandom, path: Path, wanted: Content) -> None:
    """Check the hash of an open file, and go to its start.

    Args:
        path: for errors.

    Raises:
        ArtifactError: if it differs from the manifest.
    """
    try:
        check_size(path, os.fstat(file.fileno()).st_size, wanted)
        file.seek(0)
        if not wanted.is_of(file.fileno()):
            raise _changed(path)
        check_size(path, os.fstat(file.fileno()).st_size, wanted)  # it may have grown
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {reason(error)}") from error


@contextmanager
def verified_path(path: Path, wanted: Content) -> Generator[Path]:
    """A path to the checked file until the block ends, even if another file takes its name.

    It is for libraries that take only a path. If the system has no names for open files, it is the given path.

    Raises:
        ArtifactError: as `open_verified`.
    """
    with open_verified(path, wanted) as file:
        yield _held(file, path)


@contextmanager
def verifying(path: Path, wanted: Content) -> Generator[Path]:
    """A path as of `verified_path` to a file that other threads check while the block runs. The block ends when they are done.

    Nothing that the block makes of the file may run before. An error of the block is raised only if the file is unchanged.

    Raises:
        ArtifactError: as `open_verified`.
    """
    with open_plain(path) as file, ThreadPoolExecutor(1) as pool:
        checked = submitted(pool, partial(verify, file, path, wanted))
        try:
            yield _held(file, path)
        except Exception as error:
            if (found := checked.exception()) is not None:
                raise found from error
            raise
        checked.result()


def _held(file: BufferedReader, path: Path) -> Path:
    """The system's own name for an open file; the given path if it has none."""
    held = Path(f"/proc/self/fd/{file.fileno()}")
    return held if held.exists() else path


def verified_bytes(path: Path, wanted: Content) -> bytes:
    """The content of a JSON file of an artifact, after checking its hash. Raises ArtifactError as `open_verified`."""
    if wanted.size > MOST_BYTES:
        raise ArtifactError(f"'{path}' has {wanted.size} bytes, and {MOST_BYTES} are the most; save the model again")
    with open_plain(path) as file:
        check_size(path, os.fstat(file.fileno()).st_size, wanted)
        try:
            # One byte more, to detect a file that grew without reading an endless one.
            content = file.read(wanted.size + 1)
        except OSError as error:
            raise ArtifactError(f"'{path}' cannot be read: {reason(error)}") from error
    if not wanted.is_of_bytes(content):
        raise _changed(path)
    return content


def check_size(path: Path, size: int, wanted: Content) -> None:
    """Refuse a file of another size than in the manifest. Raises ArtifactError."""
    if size != wanted.size:
        raise ArtifactError(f"'{path}' has {size} bytes, and had {wanted.size} when written; copy it whole, or save again")


def _changed(path: Path) -> ArtifactError:
    return ArtifactError(f"'{path}' was changed after it was written: its SHA-256 is another; copy it again, or save again")
