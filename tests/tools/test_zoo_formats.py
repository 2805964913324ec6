"""Tests of tools.zoo.formats: outcomes of formats on a model, and the section of the coverage page."""

from __future__ import annotations

from typing import Any

import pytest

from tools.zoo import catalogue, formats

ENTRIES = {entry.name: entry for entry in catalogue.entries()}


def checked(name: str, monkeypatch: pytest.MonkeyPatch, *cells: formats.Cell) -> dict[str, Any]:
    monkeypatch.setattr(formats, "CELLS", cells)
    record: dict[str, Any] = {"name": name, "family": ENTRIES[name].family}
    formats.check(ENTRIES[name], record.update)
    return record


def test_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder is written for OpenVINO, and is nothing that generates."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")
    kept = [cell for cell in formats.CELLS if cell.passes == "exact" and cell.format in ("openvino", "genai")]
    record = checked("masked/bert", monkeypatch, *kept)
    written, refused = record["cells"].values()
    assert written["outcome"] == "equal"
    # In float32, and its weights lie in a file of their own.
    assert written["error"] < 1e-4 and 0.9 < written["share"] < 2.0
    assert refused["outcome"] == "refused"
    assert not formats.is_wrong(record)


def test_what_raises_otherwise_or_leaves_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(optimized: object, path: Any) -> None:
        raise KeyError("no sentence")

    def untidy(optimized: object, path: Any) -> None:
        path.mkdir()
        raise formats.LissomError("a sentence")

    record = checked(
        "masked/bert",
        monkeypatch,
        formats.Cell("one", "exact", "nobody", broken),
        formats.Cell("other", "exact", "nobody", untidy),
    )
    assert [cell["outcome"] for cell in record["cells"].values()] == ["fails", "fails"]
    assert formats.is_wrong(record)


def test_the_section_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "CELLS", formats.CELLS[:1])
    written = {"outcome": "equal", "reason": None, "error": 1e-6, "share": 1.5}
    refused = {"outcome": "refused", "reason": "BertModel keeps state"}
    outcomes = (written, written | {"error": 2e-6, "share": 2.5}, refused)
    records = [{"family": "encoder", "model": "BertModel", "cells": {"pt2 exact": outcome}} for outcome in outcomes]
    text = formats.section(records)
    assert text.startswith("## In formats of other runtimes\n")
    assert "3 models in 1 forms: 2 written and loaded, 1 refused, 0 wrong." in text
    assert "| pt2 | `exact` | PyTorch | encoder | 3 | 2 | 2.0e-06 | 2.00 | 1 | 0 |" in text
    assert "- pt2 exact, 1 refused: the model keeps state" in text
