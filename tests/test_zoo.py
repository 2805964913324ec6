"""A few architectures of the zoo with every change; `python -m tests.zoo` checks all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.zoo import catalogue, coverage
from tests.zoo.check import check
from tests.zoo.entry import FAMILIES, Entry
from tests.zoo.known import ATTENTION_LEFT, CANNOT_BE_CAPTURED

FEW = (
    "causal/llama",
    "causal/gpt2",
    "causal/bloom",
    "causal/gemma2",
    "causal/falcon",
    "causal/gpt_neo",
    "causal/gpt_oss",
    "classifier/qwen3",
    "classifier/xlnet",
    "masked/bert",
    "masked/electra",
    "encoder-decoder/bart",
    "encoder/clip_text_model",
    "vision/swinv2",
    "vision/vit",
    "speech/hubert",
    "hand-written/packed-einsum",
    "hand-written/folded-baddbmm",
    "hand-written/multi-query",
    "hand-written/sinks",
    "hand-written/softcap",
)
ENTRIES = {entry.name: entry for entry in catalogue.entries()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def found_out(entry: Entry) -> dict[str, Any]:
    """The record of one model."""
    record: dict[str, Any] = {"name": entry.name, "family": entry.family}
    check(entry, record.update)
    return record


def assert_good(record: dict[str, Any]) -> None:
    assert record["failed"] is None, record["error"]
    assert record["captured"]
    assert record["shapes"] > 1 or not record["dynamic"]
    assert record["agrees"], f"the program differs by {record['capture_error']:.2g}"
    assert record["equal"], f"the compiled model differs by {record['compiled_error']:.2g}"


@pytest.mark.parametrize("name", FEW)
def test_few(name: str) -> None:
    record = found_out(ENTRIES[name])
    assert_good(record)
    assert "batch" in record["dynamic"]
    assert record["sites"]["attention"] == record["expected"]["attention"]
    assert record["miscounted"] == []


def test_models_known_for_something_are_in_the_zoo() -> None:
    assert set(ENTRIES) | {name for name in ATTENTION_LEFT if name.startswith("x-")} >= {*CANNOT_BE_CAPTURED, *ATTENTION_LEFT}


def test_names_are_unique_and_of_a_known_family() -> None:
    names = [entry.name for entry in catalogue.entries()]
    assert len(names) == len(set(names))
    assert {entry.family for entry in catalogue.entries()} <= set(FAMILIES)
    assert all(name.startswith(f"{entry.family}/") for name, entry in ENTRIES.items())


def test_page_tells_of_every_model() -> None:
    records = [
        {
            "name": "causal/llama", "family": "causal", "captured": True, "dynamic": ["batch", "sequence"], "failed": None,
            "agrees": True, "equal": True, "shapes": 4, "capture_error": 0.0, "compiled_error": 1e-7, "total_seconds": 2.4,
            "expected": {"attention": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "feed_forward": 2}, "skipped": {},
            "sites": {"attention": 2, "heads": [4], "kv_heads": [4], "head_dim": [16], "feed_forward": 2}, "miscounted": [],
        },
        {"name": "causal/dbrx", "family": "causal", "failed": "capture", "error": "CaptureError: a | b", "total_seconds": 3.0},
    ]  # fmt: skip
    text = coverage.page(records)
    assert "Of 2 models 2 run in eager; of these 1 (50.0%) are captured and equal. Of the 1 whose" in text
    assert "| causal | 2 | 1 | 1 | 1 | 1 | 1 of 1 | 1 of 1 | 1 of 1 |" in text
    assert (
        "| llama | yes | batch, sequence | 2 of 2 | 2 of 2 | 4 sizes | 2 | kv heads 4, where the configuration says 2 |" in text
    )
    assert coverage.surprises(records) == []
    assert coverage.surprises([records[0] | {"equal": False}]) == ["causal/llama is not equal"]
    assert coverage.surprises([records[0] | {"name": "causal/dbrx"}]) == [
        "causal/dbrx is captured now; take it out of known.py"
    ]
    assert "| dbrx | no |  |  |  |  | 3 | capture: CaptureError: a \\| b |" in text


def test_page_has_a_column_of_onnx_runtime_when_it_was_tried() -> None:
    good = {
        "name": "causal/llama", "family": "causal", "captured": True, "dynamic": ["batch"], "failed": None, "agrees": True,
        "equal": True, "shapes": 4, "capture_error": 0.0, "compiled_error": 1e-7, "total_seconds": 2.4, "skipped": {},
    }  # fmt: skip
    other = good | {"name": "causal/gpt2"}
    assert "| ONNX Runtime |" not in coverage.page([good, other])
    failed = {"name": "causal/gpt2", "failed": "compile", "error": "UnsupportedError: no kernel"}
    text = coverage.page(coverage.with_runtime([good, other], [good | {"shapes": 3}, failed]))
    assert "Of 2 tried on ONNX Runtime 1 (50.0%) are equal." in text
    assert "| FLOPs | ONNX Runtime |" in text
    assert "| llama | yes | batch |  |  | 4 sizes | 3 sizes | 2 |  |" in text
    assert "| gpt2 | yes | batch |  |  | 4 sizes | no | 2 | ONNX Runtime: UnsupportedError: no kernel |" in text
    assert "| all | 2 |" in text and text.count("| 1 of 2 |") == 2
