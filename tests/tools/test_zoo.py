"""A few architectures of the zoo with every change; `python -m tools.zoo` checks all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.neighbours import all_but_slow
from tools.zoo import catalogue, coverage, dynamo
from tools.zoo.check import BACKENDS, check
from tools.zoo.entry import FAMILIES
from tools.zoo.fresh import loader
from tools.zoo.known import ATTENTION_LEFT, CANNOT_BE_CAPTURED, CANNOT_BE_SAVED, NOT_ON_ONNX_RUNTIME
from tools.zoo.users_models import PADDING

FEW = ("causal/llama", "vision/vit")
# Large, or of a kind with one above or in tests of passes.
MORE = (
    "masked/bert",
    "encoder-decoder/bart",
    "hand-written/folded-baddbmm",
    "hand-written/multi-query",
    "hand-written/packed-einsum",
    "hand-written/sinks",
    "hand-written/softcap",
    "causal/gpt2",
    "speech/hubert",
    "causal/bloom",
    "classifier/qwen3",
    "encoder/clip_text_model",
    "causal/gemma2",
    "causal/falcon",
    "causal/gpt_neo",
    "causal/gpt_oss",
    "classifier/xlnet",
    "masked/electra",
    "vision/swinv2",
)
ENTRIES = {entry.name: entry for entry in catalogue.entries()}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def loading() -> Iterator[str]:
    """Where artifacts are loaded in processes that never saw the model."""
    with loader() as address:
        yield address


@pytest.mark.parametrize("name", all_but_slow((*FEW, *MORE), *FEW))
def test_few(name: str, loading: str) -> None:
    """One contract: the same structure and the same values on every backend, and after saving and loading."""
    record: dict[str, Any] = {"name": name, "family": ENTRIES[name].family}
    check(ENTRIES[name], record.update, tuple(BACKENDS), loading)
    assert record["failed"] is None, record["error"]
    assert record["shapes"] > 1 or not record["dynamic"]
    assert record["agrees"], f"the program differs by {record['capture_error']:.2g}"
    for backend in BACKENDS:
        assert coverage.is_equal(record, backend), record["backends"][backend]
        assert coverage.is_loaded(record, backend), record["backends"][backend]
    assert "batch" in record["dynamic"]
    assert record["sites"]["attention"] == record["expected"]["attention"]
    assert record["miscounted"] == []


UNDER_TORCH_COMPILE = ("hand-written/multi-query",)
# They take longer, and their layers are in those above or in tests/torch_compile/test_torch_compile.py, which has small ones of
# BERT, GPT-2 and Llama.
MORE_UNDER_TORCH_COMPILE = (
    *("vision/vit", "causal/gpt2", "masked/bert", "causal/llama", "encoder-decoder/bart", "encoder/clip_text_model"),
    "hand-written/nn-transformer",
)


@pytest.mark.parametrize(
    "name",
    all_but_slow((*UNDER_TORCH_COMPILE, *MORE_UNDER_TORCH_COMPILE), *UNDER_TORCH_COMPILE),
)
def test_few_under_torch_compile(name: str) -> None:
    record: dict[str, Any] = {"name": name, "family": ENTRIES[name].family}
    dynamo.check(ENTRIES[name], record.update)
    assert record["failed"] is None, record["error"]
    assert record["shapes"] > 1
    for found in record["modes"].values():
        assert found["equal"], found["problem"]
        assert found["lowered"] == found["graphs"] > 0, found["reasons"]


def test_models_known_for_something_are_in_the_zoo() -> None:
    known = {*CANNOT_BE_CAPTURED, *CANNOT_BE_SAVED, *ATTENTION_LEFT, *NOT_ON_ONNX_RUNTIME}
    assert set(ENTRIES) | {name for name in ATTENTION_LEFT if name.startswith("x-")} >= known


def test_names_are_unique_and_of_a_known_family() -> None:
    names = [entry.name for entry in catalogue.entries()]
    assert len(names) == len(set(names))
    assert {entry.family for entry in catalogue.entries()} <= set(FAMILIES)
    assert all(name.startswith(f"{entry.family}/") for name, entry in ENTRIES.items())


def test_translations_read_padding() -> None:
    src, tgt = ENTRIES["hand-written/translation"].build().args
    assert torch.equal(src == PADDING, torch.arange(12) > torch.tensor([[11], [8]]))
    assert torch.equal(tgt == PADDING, torch.arange(9) > torch.tensor([[8], [5]]))


GOOD = {"equal": True, "error_found": 1e-7, "structure": True, "reload_error": 1e-7, "reloaded": True}
LLAMA = {
    "name": "causal/llama", "family": "causal", "captured": True, "dynamic": ["batch", "sequence"], "failed": None,
    "agrees": True, "shapes": 4, "capture_error": 0.0, "total_seconds": 2.4, "backends": {"eager": GOOD},
    "expected": {"attention": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "feed_forward": 2}, "skipped": {},
    "sites": {"attention": 2, "heads": [4], "kv_heads": [4], "head_dim": [16], "feed_forward": 2}, "miscounted": [],
}  # fmt: skip


def test_page_tells_of_every_model() -> None:
    records = [
        LLAMA,
        {
            "name": "causal/qwen4_exp",
            "family": "causal",
            "failed": "capture",
            "error": "CaptureError: a | b",
            "total_seconds": 3.0,
        },
    ]
    text = coverage.page(records)
    assert "Of 2 models 2 run in eager; of these 1 (50.0%) are captured and equal. Of the 1 whose" in text
    assert "Of 1 compiled models 1 give the same outputs when loaded in another process." in text
    assert "| causal | 2 | 1 | 1 | 1 | 1 | 1 of 1 | 1 of 1 | 1 of 1 | 1 of 1 |" in text
    assert (
        "| llama | yes | batch, sequence | 2 of 2 | 2 of 2 | 4 sizes | eager | 2 | kv heads 4, where the configuration says 2 |"
    ) in text
    assert coverage.surprises(records) == []
    assert coverage.surprises([records[0] | {"agrees": False}]) == ["causal/llama is not equal"]
    assert coverage.surprises([records[0] | {"name": "causal/qwen4_exp"}]) == [
        "causal/qwen4_exp is captured now; take it out of known.py"
    ]
    assert "| qwen4_exp | no |  |  |  |  |  | 3 | capture: CaptureError: a \\| b |" in text


def test_page_has_onnx_runtime_column_when_tried() -> None:
    failed = {"failed": "compile", "error": "UnsupportedError: no kernel"}
    other = LLAMA | {"name": "causal/gpt2", "backends": {"eager": GOOD, "onnxruntime": failed}, "sites": None}
    lost = GOOD | {"reloaded": False, "reload_error": 0.5}
    third = LLAMA | {"name": "causal/axk2", "backends": {"eager": lost, "onnxruntime": failed}, "sites": None}
    records = [LLAMA | {"backends": {"eager": GOOD, "onnxruntime": GOOD}, "sites": None}, other, third]
    text = coverage.page(records)
    assert "On ONNX Runtime 1 (33.3%) are equal. Of 4 compiled models 3 give the same outputs when loaded" in text
    assert "| eager | ONNX Runtime | loaded |" in text
    assert "| llama | yes | batch, sequence |  |  | 4 sizes | 4 sizes | eager, ONNX Runtime | 2 |  |" in text
    assert "| gpt2 | yes | batch, sequence |  |  | 4 sizes | no | eager | 2 | ONNX Runtime, compile: Unsupported" in text
    assert "eager: differs by 0.5 relative when loaded; ONNX Runtime: it takes the top k" in text
    assert coverage.surprises(records) == [
        "causal/gpt2 is not on ONNX Runtime",
        "causal/axk2 is not the same when loaded for eager",
    ]
    unsaved = LLAMA | {"name": "hand-written/gru", "backends": {"eager": lost, "onnxruntime": lost}}
    saved = unsaved | {"backends": {"eager": GOOD, "onnxruntime": GOOD}}
    assert coverage.surprises([unsaved]) == []
    assert coverage.surprises([saved]) == ["hand-written/gru is saved now; take it out of known.py"]


def test_page_keeps_the_section_on_torch_compile(tmp_path: Path) -> None:
    mode = {"equal": True, "error_found": 0.0, "graphs": 1, "lowered": 1, "reasons": [], "seconds": 1.0}
    broken = mode | {"equal": False, "problem": "differs by 1 relative", "without": None}
    written = mode | {"lowered": 0, "reasons": ["it writes to the buffer 'x' of its module"]}
    foreign = broken | {"without": "Unsupported: no"}
    names = {"llama": mode, "gpt2": broken, "bert": written, "dbrx": foreign}
    records = [
        {"name": f"causal/{name}", "family": "causal", "failed": None, "modes": {"automatic": mode, "dynamic": found}}
        for name, found in names.items()
    ]
    page = tmp_path / "coverage.md"
    coverage.write_page(page, [LLAMA])
    coverage.write_dynamo(page, records[:1])
    coverage.write_dynamo(page, records)
    coverage.write_page(page, [LLAMA])
    text = page.read_text()
    assert text.startswith("# Coverage")
    assert text.count("## torch.compile") == 1
    assert "Of 4 models Dynamo runs 3; of these 2 (66.7%) are equal." in text
    assert "| causal | 4 | 3 | 3 | 2 | 2 |" in text
    assert "| causal/gpt2 | differs by 1 relative |" in text
    assert "| causal/bert | unchanged: it writes to the buffer 'x' of its module |" in text
    assert "| causal/dbrx | fails in Dynamo: Unsupported: no |" in text
    assert [record["name"] for record in records if coverage.is_wrong(record)] == ["causal/gpt2"]
