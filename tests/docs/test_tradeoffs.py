"""The page of trade-offs: its pipelines are valid, and its ratings follow from the rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.passes import PASSES, RECIPES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def benchmarks():
    """The modules of the page, which import their neighbours in benchmarks/ by name."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        import tradeoff_page
        import tradeoff_rows

        yield tradeoff_rows, tradeoff_page
    finally:
        sys.path.remove(folder)


def row(module, technique="attention heads", **measured):
    """A row of MiniLM."""
    return module.Row("minilm", technique, "prune-heads", "a machine", **measured)


def test_every_pipeline_is_valid(benchmarks):
    rows, _ = benchmarks
    for item in rows.TECHNIQUES:
        for model in rows.MODELS:
            passes = item.passes(model)
            assert passes or item.without, f"{item.name} has no passes for {model}, and says no reason"
            if passes not in ("", rows.RANKS):
                parse_pipeline(passes, PASSES, RECIPES)


def test_names_are_unique(benchmarks):
    names = [item.name for item in benchmarks[0].TECHNIQUES]
    assert len(names) == len(set(names))


def test_rows_of_another_machine_are_named(benchmarks):
    module, page = benchmarks
    rows = [row(module, technique="exact"), row(module), replace(row(module, technique="bfloat16"), machine="another")]
    assert list(page.elsewhere("minilm", rows)) == ["Measured on another: bfloat16.\n"]


def test_survey_is_rated_by_best_row_that_keeps_quality(benchmarks):
    module, page = benchmarks
    rows = [
        row(module, saved=0.1, faster=1.3, kept=0.99),
        row(module, technique="feed-forward neurons", saved=0.7, faster=3.0, kept=0.5),
    ]
    memory, speed, complexity = page.ratings("Pruning", "minilm", rows)
    assert (memory.level, speed.level, complexity.level) == ("Low", "Medium", "Medium")
    assert memory.figure == "10% by attention heads, 99% kept"


def test_a_difference_from_the_survey_has_a_sentence(benchmarks):
    module, page = benchmarks
    lines = list(page.beside_survey([row(module, saved=0.1, faster=1.3)]))
    assert any(
        line.startswith("- Pruning, memory savings: the survey says High, measured is Low on all-MiniLM") for line in lines
    )
    assert not any(line.startswith("- Pruning, speed-up") for line in lines)


def test_the_page_shows_what_was_refused(benchmarks):
    module, page = benchmarks
    text = page.page([row(module, failed="no kernel | here")])
    assert "refused: no kernel / here" in text
    assert "not measured" in text


def test_the_page_is_made_of_the_kept_rows(benchmarks):
    module, page = benchmarks
    records = ROOT / "benchmarks" / "tradeoffs.json"
    rows = [module.Row(**item) for item in json.loads(records.read_text(encoding="utf-8"))] if records.exists() else []
    assert (ROOT / "docs" / "tradeoffs.md").read_text(encoding="utf-8") == page.page(rows)
