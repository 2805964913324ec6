"""Tests of artifacts for several ranks: what of a manifest and of a rank's files is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import lissom
from lissom.artifacts.manifest import NAME, read_manifest, write_manifest
from lissom.errors import ArtifactError
from tests.support.ranks import printed, run_ranks, small_ids, small_llama


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama saved for two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "llama"
    lissom.compile(small_llama(), {"input_ids": small_ids()}, checks="off", backend="distributed", world_size=2).save(folder)
    return folder


@pytest.mark.parametrize("world_size", [10**9, 1, 0, -3, True, 2.5, "2", None])
def test_manifest_for_impossible_number_of_ranks_is_refused(world_size: object, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    manifest = read_manifest(saved / NAME)
    write_manifest(replace(manifest, options={**manifest.options, "world_size": world_size}), tmp_path / "model" / NAME)
    with pytest.raises(ArtifactError, match=r"is for .* ranks, and a program is shared by 2 to 1024; save the model again"):
        lissom.load(tmp_path / "model")


@pytest.mark.multiprocess
def test_manifest_that_names_no_weights_of_rank_is_refused(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    manifest = read_manifest(saved / NAME)
    files = {name: content for name, content in manifest.files.items() if name != "rank-1.safetensors"}
    write_manifest(replace(manifest, files=files), tmp_path / "model" / NAME)
    (tmp_path / "model" / "rank-1.safetensors").unlink()
    lines = printed(run_ranks('join(); said(lambda: lissom.load(folder / "model"))', tmp_path))
    assert lines[0] == lines[1]
    assert "ArtifactError the manifest of '" in lines[0][0] and "names no 'rank-1.safetensors'" in lines[0][0]


@pytest.mark.multiprocess
def test_a_rank_without_kernels_says_so_when_it_loads(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    script = """
    os.environ["LISSOM_NATIVE"] = "0"
    import warnings
    join()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = lissom.load(folder / "model")
    print(*(str(item.message) for item in found if "kernels" in str(item.message)))
    print(model(input_ids=small_ids()).logits.shape)
    torch.distributed.destroy_process_group()
    """
    sentence = "LlamaForCausalLM runs slowly without C++ kernels: LISSOM_NATIVE=0 switches the C++ kernels off"
    assert printed(run_ranks(script, tmp_path)) == [[sentence, "torch.Size([2, 5, 61])"]] * 2
