"""The searches that a store holds, as reports."""

from __future__ import annotations

from pathlib import Path

from lissom.errors import ArtifactError
from lissom.tuning.candidates import Aim, Candidate, read_candidate
from lissom.tuning.report import TuneReport
from lissom.tuning.spelling import EXACT
from lissom.tuning.store import FILE, Record, Store, number, text


def stored_reports(directory: str | Path) -> list[TuneReport]:
    """The report of every search in a store, each with the bound of its latest call.

    Raises:
        ArtifactError: if the directory holds no store.
    """
    if not (Path(directory) / FILE).is_file():
        raise ArtifactError(f"'{directory}' holds no {FILE}; give the directory of --store")
    store = Store(directory)
    return [report for record in store.all("run") if (report := _report(store, record)) is not None]


def _report(store: Store, run: Record) -> TuneReport | None:
    figures = {name: number(run, name, 0.0) for name in ("max_drop", "milliseconds", "bytes")}
    max_drop, milliseconds, size = figures.values()
    if max_drop is None or milliseconds is None or size is None:
        return None
    aim = Aim(run.get("memory") is True, max_drop, number(run, "target", 0.0))
    exact = Candidate(EXACT, text(run, "backend"), milliseconds, milliseconds, milliseconds, int(size))
    measured = [
        candidate for record in store.all("candidate", text(run, "key")) if (candidate := read_candidate(record)) is not None
    ]
    candidates = (exact, *measured)
    return TuneReport(text(run, "model"), aim, candidates, aim.choose(candidates), bool(text(run, "metric")))
