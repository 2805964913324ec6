"""Tests of decoders for several texts in directories."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import lissom
from lissom.artifacts.manifest import NAME, Content, read_manifest
from lissom.errors import ArtifactError
from lissom.generation.directory import POOL
from lissom.generation.pool import PooledDecoder
from lissom.generation.prompted import load_prompted
from tests.artifacts.test_directory import rewrite
from tests.support.decoders import decoder

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def pool() -> PooledDecoder:
    options: dict[str, Any] = {"passes": "quantize{scheme=int8-weight}", "goal": None, "checks": "off"}
    return lissom.compile_pool(decoder("llama"), max_length=40, sequences=2, slots=96, **options)


@pytest.fixture(scope="module")
def original(pool: PooledDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "saved"
    pool.save(path)
    return path


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "saved"))


def test_it_comes_back(pool: PooledDecoder, saved: Path) -> None:
    again = lissom.load_pool(saved)
    assert (again.max_length, again.sequences, again.slots) == (40, 2, 96)
    assert again.config.to_dict() == pool.config.to_dict() | {"_name_or_path": str(saved)}
    assert [answer.tolist() for answer in again.generate(PROMPTS, 12)] == [
        answer.tolist() for answer in pool.generate(PROMPTS, 12)
    ]


def test_what_texts_wrote_is_not_saved(pool: PooledDecoder, tmp_path: Path, original: Path) -> None:
    pool.generate(PROMPTS, 12)
    pool.save(tmp_path / "used")
    assert {path.name: path.read_bytes() for path in (tmp_path / "used").iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }


def test_each_kind_of_decoder_has_its_function(saved: Path, tmp_path: Path) -> None:
    said = f"'{saved}' holds a decoder for several texts; load it with lissom.load_pool"
    for load in (lissom.load_generation, lambda path: load_prompted(str(path), "a text", None)):
        with pytest.raises(ArtifactError) as caught:
            load(saved)
        assert str(caught.value) == said
    lissom.compile_generation(decoder("llama"), max_length=32, checks="off").save(tmp_path / "one")
    with pytest.raises(ArtifactError, match=r"holds a decoder for one text at a time; load it with lissom\.load_generation$"):
        lissom.load_pool(tmp_path / "one")
    with pytest.raises(ArtifactError, match="holds no saved decoder"):
        lissom.load_pool(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"max_length": 40}', "there is no field 'sequences'"),
        ('{"max_length": 40, "sequences": 2, "slots": 96}', "slots"),
        ('{"max_length": 97, "sequences": 2}', "a pool of 96 slots has no texts of 97 tokens, 2 at once"),
        ('{"max_length": 40, "sequences": 0}', "a pool of 96 slots has no texts of 40 tokens, 0 at once"),
        ('{"max_length": -1, "sequences": 2}', "-1 is negative"),
        ('{"max_length": true, "sequences": 2}', "not of type int"),
        ("[40, 2]", "is not a table"),
    ],
)
def test_wrong_sizes_are_refused(saved: Path, content: str, said: str) -> None:
    (saved / POOL).write_text(content)
    rewrite(saved, files={**read_manifest(saved / NAME).files, POOL: Content.of(saved / POOL)})
    with pytest.raises(ArtifactError) as caught:
        lissom.load_pool(saved)
    assert f"{POOL}' holds what cannot be read: " in str(caught.value) and said in str(caught.value)


def test_a_decoder_for_one_text_is_no_pool(saved: Path, tmp_path: Path) -> None:
    """The file alone does not make one."""
    one = tmp_path / "one"
    lissom.compile_generation(decoder("llama"), max_length=32, checks="off").save(one)
    shutil.copy(saved / POOL, one)
    rewrite(one, files={**read_manifest(one / NAME).files, POOL: Content.of(one / POOL)})
    with pytest.raises(ArtifactError, match="the program does not take input_ids, position_ids, slots, key_positions, own"):
        lissom.load_pool(one)
