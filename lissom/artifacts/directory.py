"""An artifact's directory: written beside its place and renamed into it; read only when every byte is as it was written."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from lissom.artifacts.handles import Content
from lissom.artifacts.manifest import NAME, Manifest, read_manifest
from lissom.compiler.errors import ArtifactError

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def is_artifact(path: str | Path) -> bool:
    """True for a directory with a manifest in it; whether it can be read is another question."""
    return (Path(path) / NAME).is_file()


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory, and put it in the place of `target`.

    An error, an interrupt or a full disk on the way leaves what was at `target`, or nothing. Where an artifact is there
    already, two renames exchange them; a process killed between the two leaves the old one beside, under a hidden name.

    Raises: ArtifactError when `target` is something else than an artifact, or cannot be written.
    """
    target = target.absolute()
    check_target(target)
    fresh, old = (target.with_name(f".{target.name}.{secrets.token_hex(4)}.{word}") for word in ("new", "old"))
    try:
        fresh.mkdir()
        write(fresh)
        for path in (*fresh.iterdir(), fresh):
            _flush(path)
        _exchange(target, fresh, old)
        _flush(target.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(
            f"'{target}' cannot be written: {reason}; what was there before is unchanged: "
            f"make room, or choose another directory"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path) -> None:
    """Refuse a place where no artifact can be put. Raises: ArtifactError."""
    if not target.name:
        raise ArtifactError(f"'{target}' is no name for an artifact; name a directory that is not there yet")
    if not target.parent.is_dir():
        raise ArtifactError(f"'{target}' cannot be written: there is no directory '{target.parent}'; make it first")
    if target.is_symlink():
        raise ArtifactError(f"'{target}' is a symbolic link, and would be replaced; name the directory itself")
    if target.exists() and not is_artifact(target) and not _is_empty(target):
        raise ArtifactError(f"'{target}' exists and is no artifact, so it is not replaced; choose another directory")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _exchange(target: Path, fresh: Path, old: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    try:
        target.rename(old)
        fresh.rename(target)
    # An interrupt may come between the two.
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def _flush(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before they are relied on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_directory(
    directory: Path, passed_over: Callable[[Manifest], Collection[str]] = lambda _: frozenset[str]()
) -> Manifest:
    """The manifest of an artifact, every file of which is there, and is as it was written.

    passed_over: files of which it does not matter; they are not opened.

    Raises: ArtifactError when the directory is no artifact, or holds anything else than its manifest says.
    """
    if not directory.is_dir():
        raise ArtifactError(f"there is no directory '{directory}'; name one that CompiledModel.save wrote")
    if not is_artifact(directory):
        raise ArtifactError(f"'{directory}' is no artifact: it has no {NAME}; name a directory that CompiledModel.save wrote")
    _check_plain(directory / NAME)
    manifest = read_manifest(directory / NAME)
    unread = passed_over(manifest)
    _check_names(directory, manifest.files, unread)
    seen = {name: _check_content(directory / name, content) for name, content in manifest.files.items() if name not in unread}
    return replace(manifest, files={**manifest.files, **seen})


def _check_names(directory: Path, files: Mapping[str, Content], unread: Collection[str]) -> None:
    for name in files:
        if _FILE.fullmatch(name) is None or name == NAME:
            raise ArtifactError(
                f"'{directory / NAME}' names the file '{name}', which does not lie in the artifact's directory itself; "
                f"do not use this artifact"
            )
    found = {path.name for path in directory.iterdir()} - {NAME}
    for name in sorted(found - set(files)):
        raise ArtifactError(f"'{directory}' holds '{name}', which its manifest does not name; take it out, or save again")
    for name in sorted(set(files) - found - set(unread)):
        raise ArtifactError(f"'{directory}' lacks '{name}', which its manifest names; copy it whole, or save again")


def _check_plain(path: Path) -> None:
    """Refuse what is not a file itself: a link may lead anywhere, and change. Raises: ArtifactError."""
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no plain file"
        raise ArtifactError(f"'{path}' is {what}; an artifact holds plain files only: copy the file itself")


def _check_content(path: Path, wanted: Content) -> Content:
    """What the file holds, which is what is wanted. Raises: ArtifactError."""
    _check_plain(path)
    size = path.stat().st_size
    if size != wanted.size:
        raise ArtifactError(f"'{path}' has {size} bytes, and had {wanted.size} when written; copy it whole, or save again")
    try:
        found = Content.of(path)
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror}") from error
    if found != wanted:
        raise ArtifactError(f"'{path}' was changed after it was written: its SHA-256 is another; copy it again, or save again")
    return found
