"""Tests of tools.fuzz_artifacts: a slice of a campaign; cases can be made again; what must not happen is noticed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from lissom.errors import ArtifactError
from tests.support.neighbours import all_but_slow
from tools.fuzz_artifacts.campaign import Case, Worker, cases, make_samples, run, smallest
from tools.fuzz_artifacts.mutations import CANARY, JSON, MANIFEST, Mutation, apply, seal
from tools.fuzz_artifacts.samples import SAMPLES, Answer, Sample
from tools.fuzz_artifacts.worker import Watch, judge

SLICE = ("plain", "counter", "bert")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("samples")
    make_samples(found, SLICE)
    return found


@pytest.mark.parametrize("name", all_but_slow(sorted(set(SAMPLES) - set(SLICE)), "int8", "onnx", "ranks"))
def test_a_sample_of_no_slice_is_saved_and_loaded(name, tmp_path):
    make_samples(tmp_path, [name])
    assert SAMPLES[name].load(tmp_path / name)()


@pytest.mark.slow
def test_a_slice_of_a_campaign_finds_no_fault(folder):
    words, faults = run(folder, SLICE, seed=0, count=80)
    assert faults == {}
    assert words.total() == 80
    assert {word.partition(": ")[2] for word in words} >= {"refused", "equal"}


def test_the_same_seed_makes_the_same_cases(folder, tmp_path):
    first, again = (list(islice(cases(folder, SLICE, 5), 40)) for _ in range(2))
    assert first == again
    assert list(islice(cases(folder, SLICE, 6), 40)) != first
    for case in first:
        assert Case.of(str(case)) == case
        for place in ("one", "other"):
            apply(Path(shutil.copytree(folder / case.sample, tmp_path / str(case)[:60] / place)), case.mutations)
        one, other = (sorted((tmp_path / str(case)[:60] / place).iterdir()) for place in ("one", "other"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]
        shutil.rmtree(tmp_path / str(case)[:60])


@pytest.mark.parametrize("kind", JSON)
def test_every_change_of_json_changes_some_program(kind, folder, tmp_path):
    changed = 0
    for seed in range(10):
        place = Path(shutil.copytree(folder / "plain", tmp_path / str(seed)))
        apply(place, [Mutation("program.json", kind, seed)])
        changed += json.loads((place / "program.json").read_text()) != json.loads((folder / "plain/program.json").read_text())
    assert changed > 0


def test_what_is_sealed_loads(folder, tmp_path):
    place = Path(shutil.copytree(folder / "plain", tmp_path / "artifact"))
    fields = json.loads((place / MANIFEST).read_text())
    (place / "steps.json").write_text((place / "steps.json").read_text() + " ")
    with pytest.raises(ArtifactError, match="bytes, and had"):
        SAMPLES["plain"].load(place)
    seal(place)
    assert json.loads((place / MANIFEST).read_text())["name"] == fields["name"]
    assert SAMPLES["plain"].load(place)()


def test_case_without_changes_its_fault_does_not_need():
    needed = Mutation("b", "number", 2)
    case = Case("plain", (Mutation("a", "text", 1), needed, Mutation("c", "text", 3)))
    assert smallest(case, lambda fewer: "FAULT" if needed in fewer.mutations else "equal") == Case("plain", (needed,))


def _watched(load: Callable[[Watch], Callable[[], Answer]]) -> str:
    watch = Watch()
    return judge(Sample(lambda _: None, lambda _: load(watch)), Path(), [1], watch)


def _raise(error: Exception) -> Callable[[], Answer]:
    raise error


def _do(*things: object, answer: Answer | None = None) -> Callable[[], Answer]:
    return lambda: [1] if answer is None else answer


@pytest.mark.parametrize(
    ("load", "word"),
    [
        (lambda _: _do(), "equal"),
        (lambda _: _do(answer=[2]), "other"),
        (lambda _: _raise(ArtifactError("a sentence")), "refused"),
        (lambda _: _raise(ArtifactError("two\nlines")), "FAULT a refusal of several lines: two\nlines"),
        (lambda _: _raise(KeyError("x")), "FAULT loading raises KeyError at test_fuzz_artifacts.py"),
        (lambda _: lambda: _raise(KeyError("x")), "FAULT a call raises KeyError at test_fuzz_artifacts.py"),
        (lambda _: _do(torch.rand(1)), "FAULT PyTorch's random state is another (equal)"),
        (lambda _: _do(random.random()), "FAULT Python's random state is another (equal)"),
        (lambda watch: _do(watch.hear("compile", (f"x = {CANARY}", "file"))), "FAULT compiles text of a file (equal)"),
        (lambda watch: _do(watch.hear("open", ("name", "w", 0))), "FAULT opens name to write (equal)"),
        (lambda watch: _do(watch.hear("os.system", ("ls",))), "FAULT os.system ('ls',) (equal)"),
    ],
)
def test_what_must_not_happen_is_noticed(load, word):
    assert _watched(load).startswith(word)


@pytest.mark.slow
def test_a_worker_that_does_not_answer_is_noticed(folder):
    worker = Worker(folder, 600.0)
    assert worker.judge(Case("plain", ())) == "equal"
    worker.seconds = 0.0
    assert worker.judge(Case("plain", ())) == "FAULT no answer in 0 s"
