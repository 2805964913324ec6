"""Tests of lissom.frontends.checkpoints.shards: files that are missing, cut short, or differ from their index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lissom.errors import ArtifactError
from lissom.frontends.checkpoints.shards import INDEX, check_shards
from lissom.frontends.models.huggingface import load

SHARD = "model-00002-of-00007.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="5KB")
    return path


def changed(path: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> None:
    tensors = load_file(path)
    change(tensors, next(name for name in tensors if tensors[name].dim() == 2))
    save_file(tensors, path, metadata={"format": "pt"})


def lose(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def announce_much(path: Path) -> None:
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def reshape(path: Path) -> None:
    changed(path, lambda tensors, name: tensors.update({name: torch.zeros(3, 7)}))


def halve(path: Path) -> None:
    changed(path, lambda tensors, name: tensors.update({name: tensors[name].half()}))


def rename(path: Path) -> None:
    changed(path, lambda tensors, name: tensors.update({"other": tensors.pop(name)}))


def lie_about_sizes(path: Path) -> None:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    next(entry for name, entry in header.items() if name != "__metadata__")["shape"] = [3, 1000]
    text = json.dumps(header).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lose, "lacks model-00002-of-00007.safetensors, which the index names for"),
        (cut, r"has \d+ bytes, and its header says \d+; copy the file again"),
        (cut_header, "has no header of safetensors"),
        (announce_much, "has no header of safetensors"),
        (reshape, "a shard has other shapes or dtypes"),
        (halve, "a shard has other shapes or dtypes"),
        (rename, "which the index places there"),
        (lie_about_sizes, "which is not its shape's"),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_damaged_shard_is_one_sentence(sharded: Path, tmp_path: Path, spoil: Callable[[Path], None], sentence: str) -> None:
    folder = shutil.copytree(sharded, tmp_path / "copied")
    spoil(folder / SHARD)
    with pytest.raises(ArtifactError, match=sentence) as raised:
        load(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{}", "[1]", '{"weight_map": 3}', "{"])
def test_damaged_index_is_one_sentence(sharded: Path, tmp_path: Path, text: str) -> None:
    folder = shutil.copytree(sharded, tmp_path / "copied")
    (folder / INDEX).write_text(text)
    with pytest.raises(ArtifactError, match="is no index of weights"):
        check_shards(folder)


def test_index_names_no_file_outside_the_folder(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "copied")
    shutil.copy(folder / SHARD, tmp_path / "outside.safetensors")
    (folder / INDEX).write_text((folder / INDEX).read_text().replace(SHARD, "../outside.safetensors"))
    with pytest.raises(ArtifactError, match=r"lacks \.\./outside\.safetensors"):
        check_shards(folder)


def test_weight_of_another_shape_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "copied")
    changed(folder / SHARD, lambda tensors, name: tensors.update({name: tensors[name].reshape(-1, 2).contiguous()}))
    with pytest.raises(ArtifactError, match=r"in the shape \[128, 2\], and its configuration says \[16, 16\]"):
        load(str(folder))


def test_whole_checkpoint_passes(sharded: Path) -> None:
    check_shards(sharded)
