"""Tests of tools.zoo.generation: equal greedy tokens for a few kinds of models, and the section of the coverage page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.neighbours import all_but_slow
from tools.zoo import generation
from tools.zoo.coverage import put_section

ENTRIES = {entry.name: entry for entry in generation.entries()}
NEO = "causal/gpt_neo"
# GPT-Neo and MPT count keys from the end; MVP computes its positions; DBRX, LongCat and Switch loop over experts; the others
# read sound, patches and pictures.
EQUAL = [
    NEO,
    *("causal/mpt", "causal/dbrx", "causal/longcat_flash", "causal/bert", "encoder-decoder/mvp"),
    *("encoder-decoder/switch_transformers", "speech/speech-encoder-decoder", "vision/pix2struct", "vision/donut"),
]


def checked(name: str) -> dict[str, Any]:
    record: dict[str, Any] = {"name": name, "family": ENTRIES[name].family}
    generation.check(ENTRIES[name], record.update)
    return record


@pytest.mark.parametrize("name", all_but_slow(EQUAL, NEO))
def test_tokens_are_those_of_transformers(name: str) -> None:
    record = checked(name)
    assert record["outcome"] == generation.EQUAL, record["reason"]


def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    record = checked("vision/pp_formulanet")
    assert record["outcome"] == generation.REFUSED
    assert "returns [2, 256, 4, 4]; generation takes models whose encoder returns [batch, source, width]" in record["reason"]
    assert "has a generate of its own" in checked("speech/seamless_m4t")["reason"]


def test_the_page_counts_and_explains(tmp_path: Path) -> None:
    outcomes = {"llama": "equal", "xlnet": "refused", "moshi": "not in transformers", "bert": "differs"}
    outcomes |= {"vit": "does not generate"}
    records = [
        {"name": f"causal/{name}", "family": "causal", "outcome": outcome, "reason": f"why {name}"}
        for name, outcome in outcomes.items()
    ]
    page = tmp_path / "coverage.md"
    page.write_text("# Coverage\n\n## torch.compile\n\nkept\n")
    for _ in range(2):
        put_section(page, generation.section(records))
    text = page.read_text()
    assert text.count("## Generation") == 1 and "## torch.compile\n\nkept\n" in text
    assert "Of 3 models that transformers generates with, 1 (33.3%) give equal tokens." in text
    assert "| causal | 3 | 1 | 1 | 1 |" in text
    assert "- causal/moshi: not in transformers, why moshi" in text and "vit" not in text
