"""Artifacts as other libraries keep them: packed in one file, or as links into a cache.

The file is a zip archive without compression. An artifact is read from a directory of regular files alone, so both are
copied to a temporary directory, which lives as long as the model that was loaded from it.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lissom.errors import ArtifactError
from lissom.files import writing_whole
from lissom.frontends.failures import first_line

_Model = TypeVar("_Model")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


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
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # No entry may leave the folder, or expand to more than is in the file.
            odd = [entry.filename for entry in entries if not _NAME.fullmatch(entry.filename) or entry.compress_type]
            if odd or sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile(f"it holds {odd[0]!r:.80}" if odd else "its sizes are wrong")
            for entry in entries:
                with archive.open(entry) as source, (folder / entry.filename).open("wb") as copied:
                    shutil.copyfileobj(source, copied)

    try:
        return _from_copy(unpack, load)
    except (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ArtifactError(f"'{path}' holds no program of Lissom: {first_line(error)}; export the model again") from error


def load_linked(directory: Path, load: Callable[[Path], _Model]) -> _Model:
    """What `load` makes of a directory, whose files may be links as in the cache of the Hugging Face Hub."""
    if not any(path.is_symlink() for path in directory.iterdir()):
        return load(directory)

    def copy(folder: Path) -> None:
        for path in directory.iterdir():
            shutil.copyfile(path, folder / path.name)

    return _from_copy(copy, load)


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
