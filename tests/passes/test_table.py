from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from lissom.compiler.pipeline.pass_kinds import Pass, Rewrite
from lissom.compiler.pipeline.spelling import format_pipeline, parse_pipeline
from lissom.errors import UnsupportedError
from lissom.passes import PASSES, RECIPES, known_passes
from tests.support.harness import GOLDEN

CANONICAL = [name for name, found in PASSES.items() if ".canonical." in found.__module__]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, entry: str) -> None:
    """Put a package with one entry point of the group `lissom.passes` on the path, as an installer would."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (information / "entry_points.txt").write_text(f"[lissom.passes]\n{entry}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))


PASS = """
from dataclasses import dataclass
from lissom.compiler.pipeline.pass_kinds import Rewrite

@dataclass(frozen=True)
class {name}(Rewrite):
    times: int = 1

    def run(self, edit):
        pass
"""


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_one_name_everywhere(name: str) -> None:
    found = PASSES[name]
    assert found.name() == name
    assert found.__module__.rpartition(".")[2] == name.replace("-", "_")
    assert found.__name__.lower() == name.replace("-", "")


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_frozen_dataclass(name: str) -> None:
    assert issubclass(PASSES[name], Pass)
    assert dataclasses.is_dataclass(PASSES[name])
    assert PASSES[name].__dataclass_params__.frozen


@pytest.mark.parametrize("name", CANONICAL)
def test_a_canonical_pass_is_exact_and_has_a_golden(name: str) -> None:
    assert issubclass(PASSES[name], Rewrite)
    assert (GOLDEN / f"{name.replace('-', '_')}.txt").is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_parses_and_prints_back(name: str) -> None:
    passes = parse_pipeline(name, PASSES, RECIPES)
    assert format_pipeline(passes) == RECIPES[name]
    assert passes == parse_pipeline(RECIPES[name], PASSES)


def test_no_recipe_has_the_name_of_a_pass() -> None:
    assert not set(RECIPES) & set(PASSES)


def test_every_canonical_pass_is_in_the_exact_recipe() -> None:
    assert set(CANONICAL) == set(RECIPES["exact"].split(","))


def test_known_passes_are_the_table() -> None:
    assert known_passes().items() >= PASSES.items()


def test_another_package_adds_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PASS.format(name="WaveHands")
    install(tmp_path, monkeypatch, "lissom_waving", source, "wave-hands = lissom_waving:WaveHands")
    (found,) = parse_pipeline("wave-hands{times=3}", known_passes())
    assert (found.name(), found.times) == ("wave-hands", 3)


def test_another_package_cannot_take_the_name_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PASS.format(name="RemoveNoOps")
    install(tmp_path, monkeypatch, "lissom_taking", source, "remove-no-ops = lissom_taking:RemoveNoOps")
    assert known_passes()["remove-no-ops"] is PASSES["remove-no-ops"]


@pytest.mark.parametrize(
    "source, shown", [("thing = 3", "3"), ("class thing: pass", "<class 'lissom_wrong.thing'>")], ids=["a number", "a class"]
)
def test_an_entry_point_that_is_no_pass_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, shown: str
) -> None:
    monkeypatch.delitem(sys.modules, "lissom_wrong", raising=False)
    install(tmp_path, monkeypatch, "lissom_wrong", source, "wrong = lissom_wrong:thing")
    with pytest.raises(UnsupportedError) as refusal:
        known_passes()
    assert str(refusal.value) == f"entry point 'wrong' of lissom.passes is {shown}, which is no pass class"
