"""Tests of tools.zoo.passes: outcomes of pipelines on a model, and the section of the coverage page."""

from __future__ import annotations

from typing import Any

import pytest

from tools.zoo import catalogue, passes

ENTRIES = {entry.name: entry for entry in catalogue.entries()}


def checked(name: str, monkeypatch: pytest.MonkeyPatch, **pipelines: tuple[str, ...]) -> dict[str, Any]:
    monkeypatch.setattr(passes, "WHOLE", pipelines["whole"])
    monkeypatch.setattr(passes, "CACHED", pipelines["cached"])
    record: dict[str, Any] = {"name": name, "family": ENTRIES[name].family}
    passes.check(ENTRIES[name], record.update)
    assert record["failed"] is None, record["error"]
    return record


def test_outcomes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ("prune-vocabulary{keep=60}", "prune-experts{keep=0.75}", "quantize{scheme=mxfp8-weight}")
    record = checked("causal/gpt2", monkeypatch, whole=whole, cached=("rotate{where=cache,basis=balanced}",))
    found = record["pipelines"]
    assert [outcome["outcome"] for outcome in found.values()] == ["equal", "nothing to do", "lossy", "equal"]
    assert found["prune-experts{keep=0.75}"]["reason"] == "the program has no mixtures of experts"
    # The scheme has three bits of mantissa: some hundredths of each weight.
    assert 1e-4 < found["quantize{scheme=mxfp8-weight}"]["error"] < 0.2
    assert not passes.is_wrong(record)


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    record = checked("vision/vit", monkeypatch, whole=("prune-vocabulary{keep=60}",), cached=())
    (found,) = record["pipelines"].values()
    assert found["outcome"] == "refused" and "finds no embedding of token ids" in found["reason"]


def test_the_section_counts() -> None:
    lossy = {"outcome": "lossy", "error": 0.25, "reason": ""}
    outcomes = [{"outcome": "equal", "error": 0.0, "reason": ""}, lossy, lossy | {"error": 0.5}, {"outcome": "refused"}]
    spelled = passes.WHOLE[0]
    text = passes.section([{"pipelines": {spelled: outcome}} for outcome in outcomes])
    assert text.startswith("## Passes\n")
    assert "4 models, 4 pipelines run: 1 equal, 2 lossy, 0 nothing to do, 1 refused, 0 wrong." in text
    assert f"| `{spelled}` | 4 | 1 | 2 | 0.38, 0.5 | 0 | 1 | 0 |" in text
