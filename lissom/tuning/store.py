"""The results of a search, in a directory of JSON lines that several processes may append to.

Each record is one line, written by one call and flushed to the disk, so that a killed process loses at most the record at work.
It starts with a line break too: a line that was torn is then a line of its own, which is passed over. A record holds the key of
what it was measured on; `Store.get` finds it by kind, key and name. Files are read as untrusted: numbers are checked here, and
pipeline texts by their parser.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lissom.errors import ArtifactError
from lissom.io.files import check_path, read_plain, reason

FILE = "records.jsonl"
VERSION = 1
_MOST_BYTES = 1 << 28
_LONGEST = 1 << 20
_Index = dict[tuple[str, str, str], "Record"]
Record = Mapping[str, object]


class Store:
    """The records of a directory; without one, of this search alone.

    Raises:
        ArtifactError: if the directory cannot be made or read.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.path = None if directory is None else _made(check_path(directory)) / FILE
        self.skipped = 0
        self._known: _Index = {}
        self._asked = set[str]()
        if self.path is not None and self.path.exists():
            self._read(self.path)
        self._earlier = {key for _, key, _ in self._known}

    @property
    def foreign(self) -> bool:
        """True if no record belongs to this search: there were some at the start, but none under the keys asked for since."""
        return bool(self._earlier) and self._earlier.isdisjoint(self._asked)

    def _read(self, path: Path) -> None:
        content = read_plain(path, _MOST_BYTES)
        if len(content) > _MOST_BYTES:
            raise ArtifactError(f"'{path}' has more than {_MOST_BYTES >> 20} MiB; give another directory")
        for line in content.split(b"\n"):
            if line.strip():
                record = _parsed(line)
                if record is None:
                    self.skipped += 1
                else:
                    self._known[str(record["kind"]), str(record["key"]), str(record["name"])] = record

    def get(self, kind: str, key: str, name: str) -> Record | None:
        """The latest record of that kind, measured on what the key stands for."""
        self._asked.add(key)
        return self._known.get((kind, key, name))

    def all(self, kind: str, key: str | None = None) -> list[Record]:
        """The latest record of every name, in the order of the first."""
        self._asked |= {key} if key is not None else set()
        return [record for (at, on, _), record in self._known.items() if at == kind and key in (None, on)]

    def add(self, kind: str, key: str, name: str, **fields: object) -> Record:
        """Append a record. Raises ArtifactError if it cannot be written."""
        record: Record = {"version": VERSION, "kind": kind, "key": key, "name": name, **fields}
        self._known[kind, key, name] = record
        if self.path is not None:
            try:
                _append(self.path, f"\n{json.dumps(record, separators=(',', ':'))}\n".encode())
            except OSError as error:
                raise ArtifactError(f"'{self.path}' cannot be written: {reason(error)}; choose another directory") from error
        return record


def _append(path: Path, line: bytes) -> None:
    """Append a line by one call, and flush it to the disk. Raises OSError, also for anything but a regular file."""
    # Without O_NONBLOCK, opening a pipe that nobody reads blocks forever.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is not a regular file")
        os.write(handle, line)
        os.fsync(handle)
    finally:
        os.close(handle)


def _made(directory: Path) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"'{directory}' cannot be made: {reason(error)}; choose another directory") from error
    return directory


def _parsed(line: bytes) -> Record | None:
    """The record of a line; None for a torn line, or one that is no record."""
    if len(line) > _LONGEST:
        return None
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict) and record.get("version") == VERSION:
            texts = (record.get(name) for name in ("kind", "key", "name"))
            return record if all(isinstance(text, str) for text in texts) else None
    return None


def number(record: Record, name: str, least: float = -math.inf) -> float | None:
    """A finite number of a record, at least `least`; None if it has none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    with suppress(OverflowError):  # a whole number of hundreds of digits
        return float(value) if math.isfinite(value) and value >= least else None
    return None


def text(record: Record, name: str) -> str:
    """A text of a record; empty if it has none."""
    value = record.get(name)
    return value if isinstance(value, str) else ""
