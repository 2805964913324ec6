"""Tests of lissom.compiler.paging: a model compiled from the disk, in files without names."""

from __future__ import annotations

import gc
import platform
import re
import resource
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import lissom
from lissom.compiler import paging
from lissom.driver import compile
from lissom.errors import UnsupportedError
from tests.support.models import normal, seeded, tiny_bert
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.skipif(platform.system() != "Linux", reason="pages are let go of on Linux")


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large, and hardly any of it may stay in memory."""
    monkeypatch.setattr(paging, "LARGE", 0)
    monkeypatch.setattr(compile, "_UNTIMED", 0)
    monkeypatch.setattr(paging, "SPILLED", 1)
    monkeypatch.setattr(paging, "_LEAST_HELD", 0)


@contextmanager
def largest_file(size: int) -> Generator[None]:
    """Files may have so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mapping_of(tensor: torch.Tensor) -> str:
    """What Linux says of the mapping in which a tensor lies: its file, then sizes."""
    for mapping in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        low, high = (int(part, 16) for part in mapping.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return mapping
    raise AssertionError("the tensor lies in no mapping")


def is_on_disk(tensor: torch.Tensor) -> bool:
    """True if a tensor lies in a file that has no name any more."""
    return mapping_of(tensor).splitlines()[0].endswith("(deleted)")


@pytest.mark.usefixtures("everything")
def test_spilled_tensor_keeps_values_and_strides_and_comes_home() -> None:
    tensor = normal(64, 48).t()
    values = tensor.clone()
    with paging.paged([normal(4)]):
        paging.spill(tensor)
        assert is_on_disk(tensor)
        assert torch.equal(tensor, values)
        assert tensor.stride() == (1, 48)
        paging.take_home([tensor])
        assert not is_on_disk(tensor)
    assert torch.equal(tensor, values)
    assert tensor.stride() == (1, 48)


@pytest.mark.usefixtures("everything")
def test_parts_of_memory_and_mapped_weights_stay(tmp_path: Path) -> None:
    save_file({"weight": normal(64, 64)}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    whole = normal(64, 64)
    part, places = whole[:32], (whole.data_ptr(), mapped.data_ptr())
    with paging.paged([mapped]):
        paging.spill(part)
        paging.spill(mapped)
        assert (part.data_ptr(), mapped.data_ptr()) == places


@pytest.mark.usefixtures("everything")
def test_pages_that_were_let_go_are_read_again(tmp_path: Path) -> None:
    weight = normal(256, 256)
    save_file({"weight": weight}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    made = normal(256, 256)
    values = made.clone()
    with paging.paged([mapped]):
        paging.spill(made)
        for _ in range(20):
            paging._pagers[0]._let_go()
            assert torch.equal(mapped, weight)
            assert torch.equal(made, values)


@pytest.mark.usefixtures("everything")
def test_blocks_of_a_file_are_let_go_of_with_its_weights(tmp_path: Path) -> None:
    (tmp_path / "blocks").write_bytes(bytes(1 << 20))
    blocks = torch.from_file(str(tmp_path / "blocks"), shared=False, size=1 << 20, dtype=torch.uint8)
    assert blocks.sum() == 0  # reads every page
    with paging.paged([normal(4)], [blocks]):
        paging._pagers[0]._let_go()
        assert re.search(r"^Rss: +0 kB", mapping_of(blocks), flags=re.MULTILINE)
        assert blocks.sum() == 0


@pytest.mark.usefixtures("everything")
def test_weight_written_before_the_compile_keeps_what_was_written(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(256, 256)}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        mapped = file.get_tensor("weight")
    mapped[100] = 1.0
    with paging.paged([mapped]):
        paging._pagers[0]._let_go()
    assert mapped.sum() == 256


def test_small_models_stay_in_memory() -> None:
    tensor = normal(1024, 1024)
    with paging.paged([tensor]):
        assert not paging.is_paged()
        paging.spill(tensor)
        assert not is_on_disk(tensor)


@pytest.mark.usefixtures("everything")
def test_full_disk_is_one_sentence() -> None:
    tensor = normal(1024, 1024)
    values = tensor.clone()
    with (
        paging.paged([normal(4)]),
        largest_file(1 << 20),
        pytest.raises(UnsupportedError, match=r"no room for 4\.19 MB of weights"),
    ):
        paging.spill(tensor)
    assert torch.equal(tensor, values)


@pytest.mark.usefixtures("everything")
def test_missing_folder_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(UnsupportedError, match="set TMPDIR to a folder with more room"):
        paging.empty_on_disk(4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in bfloat16, in shards."""
    path = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2
    )
    model: Any = seeded(lambda: LlamaForCausalLM(config)).bfloat16()
    model.save_pretrained(path, max_shard_size="40KB")
    return path


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    "passes",
    all_but_slow(
        [
            "quantize{scheme=int8-dynamic}",
            "quantize{scheme=int4-weight},gptq",
            "quantize{scheme=int4-weight}",
            "quantize{scheme=int8-weight,lm_head=true}",
            "awq,quantize{scheme=int4-weight}",
        ],
        "quantize{scheme=int8-dynamic}",
    ),
)
def test_decoder_from_the_disk_is_the_one_from_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    data = [{"input_ids": torch.arange(16).reshape(1, 16) + 3 * row} for row in range(4)]
    loaded = LlamaForCausalLM.from_pretrained(folder)
    whole = lissom.compile_generation(loaded, max_length=32, passes=passes, goal=None, data=data)
    paged = lissom.compile_generation(folder, max_length=32, passes=passes, data=data)
    assert any("not timed, as the model is large" in note for note in paged.report.history.steps[0].notes)
    assert paged.compiled.program.text() == whole.compiled.program.text()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(paged.step(ids), whole.step(ids))
    assert not any(is_on_disk(weight) for weight in paged.compiled.program.weights().values())
    assert not any(thread.name == "lissom-pager" for thread in threading.enumerate())
    gc.collect()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("everything")
def test_failed_compile_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with largest_file(1 << 10), pytest.raises(UnsupportedError, match="no room for"):
        lissom.compile_generation(folder, max_length=32, passes="quantize{scheme=int4-weight}")
    assert not paging.is_paged()
    assert not any(thread.name == "lissom-pager" for thread in threading.enumerate())
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("everything")
def test_encoder_is_compiled_from_its_folder(tmp_path: Path) -> None:
    bert: Any = tiny_bert()
    bert.model.save_pretrained(tmp_path)
    compiled = lissom.compile(tmp_path, bert.inputs, passes="quantize{scheme=int8-weight}", goal=None)
    whole = lissom.compile(bert.model, bert.inputs, passes="quantize{scheme=int8-weight}", goal=None)
    assert torch.equal(compiled(**bert.inputs)[0], whole(**bert.inputs)[0])
