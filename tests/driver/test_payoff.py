"""Lossy passes are undone where they gain nothing; the report says what each gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.base import Executable
from lissom.backends.eager.backend import Eager
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import Step
from lissom.compiler.pipeline.options import Goal
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.measure.timing import Timing
from lissom.passes import PASSES
from lissom.runtime.compiled_model import CompiledModel
from tests.support.decoders import decoder

aten = torch.ops.aten


@dataclass(frozen=True)
class Halve(Approximation):
    """Halves the result of every linear layer, at the cost of an operator: lossy, slower and no smaller."""

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.linear.default):
            readers = list(node.users)
            with edit.before(node.next):
                half = edit.call(aten.mul.Tensor, node, 0.5)
            for reader in readers:
                reader.replace_input_with(node, half)
            edit.rewritten += 1


@dataclass(frozen=True)
class Prepare(Halve):
    """The same for the sake of other passes."""

    cheapens: ClassVar[bool] = False


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).eval()


@pytest.fixture
def ratios(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times with a pass over those without it that the clock shows, by sample; whatever else the machine does."""
    left: list[float] = []

    def time_calls(calls: Mapping[str, object], *_: object, **__: object) -> dict[str, Timing]:
        found = left.pop(0)
        left.append(found)
        return {name: Timing(*[2 * found if name == "with" else 2.0] * 3, runs=5) for name in calls}

    monkeypatch.setattr("lissom.driver.payoff.time_calls", time_calls)
    return left


INPUTS = torch.ones(2, 64)


def step_of(found: CompiledModel, name: str) -> Step:
    return next(step for step in found.report.history.steps if step.spelling.startswith(name))


def test_a_pass_that_gains_nothing_is_undone_and_told(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Halve()])
    torch.testing.assert_close(found(INPUTS), model(INPUTS))
    step = step_of(found, "halve")
    assert step.reverted is not None and step.summary == f"reverted: {step.reverted}"
    assert step.reverted.startswith("neither faster nor smaller on eager: ")
    assert " on [2, 64], " in step.reverted and " on [32, 64])" in step.reverted
    assert step.reverted.endswith(", 0.132 MB against 0.132; goal=None keeps it")
    assert "halve was reverted: neither faster nor smaller on eager: " in " ".join(str(found.report).split())


def test_it_is_kept_untimed_when_asked(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Halve()], goal=None)
    assert not torch.allclose(found(INPUTS), model(INPUTS))
    assert not any("x the time" in note for step in found.report.history.steps for note in step.notes)


@pytest.mark.parametrize(
    ("goal", "measured", "kept"),
    [
        ("latency", (0.5, 0.5), True),
        ("latency", (1.0, 1.02), True),  # as fast, and smaller
        ("latency", (0.5, 3.0), False),  # 1.22 times in the geometric mean
        ("latency", (1.2, 0.5), True),
        ("memory", (2.0, 3.0), True),
    ],
)
def test_a_smaller_program(model: nn.Module, ratios: list[float], goal: Goal, measured: Sequence[float], kept: bool) -> None:
    ratios += measured
    found = lissom.compile(model, INPUTS, passes="cast{dtype=bf16}", goal=goal)
    step = step_of(found, "cast")
    mean = f"{(measured[0] * measured[1]) ** 0.5:.2f} x the time"
    sizes = "0.0662 MB against 0.132"
    if kept:
        (note,) = [note for note in step.notes if "x the time" in note]
        assert note.startswith(f"on eager {mean} (") and note.endswith(sizes)
    else:
        assert step.reverted is not None and step.reverted.startswith(f"slower on eager: {mean} (")
        assert step.reverted.endswith(f'{sizes}; goal="memory" keeps it')
    wanted = {torch.bfloat16 if kept else torch.float32}
    assert {weight.dtype for weight in found.program.weights().values()} == wanted


@pytest.mark.parametrize(("ratio", "settled"), [(0.5, 1), (0.8, 3), (1.3, 3), (2.0, 1)])
def test_weights_are_settled_before_a_close_verdict(
    model: nn.Module, ratios: list[float], monkeypatch: pytest.MonkeyPatch, ratio: float, settled: int
) -> None:
    ratios += [ratio, ratio]
    programs: list[Program] = []
    monkeypatch.setattr(Eager, "settle", lambda self, program: programs.append(program))
    found = lissom.compile(model, INPUTS, passes="cast{dtype=bf16}")
    assert len(programs) == settled and programs[-1] is found.program


@pytest.mark.parametrize("goal", ["latency", "memory"])
def test_a_faster_program_need_not_be_smaller(model: nn.Module, ratios: list[float], goal: Goal) -> None:
    ratios += [0.9, 0.9]
    found = lissom.compile(model, INPUTS, passes=[Halve()], goal=goal)
    assert step_of(found, "halve").reverted is None


def test_zeros_count_as_smaller_since_artifacts_leave_them_out(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes="sparsify{keep=0.25}", goal="memory")
    assert all(step.reverted is None for step in found.report.history.steps)


def test_what_serves_other_passes_is_kept(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Prepare()])
    assert not torch.allclose(found(INPUTS), model(INPUTS))


@pytest.mark.parametrize("kept", [True, False])
def test_what_reduces_the_loss_of_quantizers_stands_or_falls_with_them(
    model: nn.Module, ratios: list[float], kept: bool
) -> None:
    ratios += [0.5 if kept else 2.0]  # of the program with quantize and what follows it
    data = [torch.randn(8, 64) for _ in range(4)]
    passes = "quantize{scheme=int4-weight,lm_head=true},gptq,correct-bias"
    steps = lissom.compile(model, INPUTS, passes=passes, data=data).report.history.steps
    reverted = {step.spelling.partition("{")[0]: step.reverted for step in steps if step.kind == "approximation"}
    assert [why is None for why in reverted.values()] == [kept] * 3
    if not kept:
        assert reverted["gptq"] == "it follows quantize{scheme=int4-weight,lm_head=true}, which was reverted"


def test_later_exact_passes_rerun_and_lossy_ones_revert_too(model: nn.Module) -> None:
    passes = [Halve(), Prepare(), *parse_pipeline("remove-no-ops", PASSES)]
    found = lissom.compile(model, INPUTS, passes=passes)
    torch.testing.assert_close(found(INPUTS), model(INPUTS))
    steps = [step.spelling for step in found.report.history.steps]
    assert steps[steps.index("halve") :][:3] == ["halve", "prepare", "remove-no-ops"]
    assert found.report.history.steps[steps.index("prepare")].summary == "reverted: it follows halve, which was reverted"
    assert [step.index for step in found.report.history.steps] == list(range(len(steps)))


def test_pass_is_judged_before_it_is_trained_for_minutes(model: nn.Module) -> None:
    data = [torch.randn(8, 64) for _ in range(4)]
    passes = [Halve(), *parse_pipeline("distill{steps=3}", PASSES)]
    found = lissom.compile(model, INPUTS, passes=passes, data=data)
    torch.testing.assert_close(found(INPUTS), model(INPUTS))
    assert step_of(found, "distill").summary == "reverted: it follows halve, which was reverted"
    kept = lissom.compile(
        model, INPUTS, passes=[*parse_pipeline("prune-neurons{keep=0.25}", PASSES), *passes], data=data, goal="memory"
    )
    steps = [step.spelling for step in kept.report.history.steps if step.kind != "rewrite"]
    assert steps == ["capture", "prune-neurons{keep=0.25}", "halve", "distill{steps=3}"]
    assert step_of(kept, "halve").reverted and step_of(kept, "distill").curve


def test_each_is_judged_by_itself(model: nn.Module) -> None:
    found = lissom.compile(model, INPUTS, passes=[Halve(), *parse_pipeline("cast{dtype=bf16}", PASSES)], goal="memory")
    torch.testing.assert_close(found(INPUTS), model(INPUTS), atol=0.02, rtol=0.02)
    assert all(weight.dtype == torch.bfloat16 for weight in found.program.weights().values())


def test_decoder_is_timed_on_step_and_prefill_cache_empty() -> None:
    found = lissom.compile_generation(decoder("llama"), max_length=32, passes="cast{dtype=bf16}", goal="memory")
    (note,) = [note for note in step_of(found.compiled, "cast").notes if "x the time" in note]
    assert "on [1, 1], [1, 32], [1]" in note and "on [1, 32], [1]" in note
    assert not any(found.program.weight(name).any() for name in found.program.state)


@pytest.mark.parametrize("goal", ["latency", "memory"])
@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_program_that_was_timed_is_the_result(
    model: nn.Module, ratios: list[float], monkeypatch: pytest.MonkeyPatch, goal: Goal, ratio: float
) -> None:
    ratios += [ratio] * 4
    lowered: list[str] = []
    packs = PASSES["pack-linear"].run
    monkeypatch.setattr(PASSES["pack-linear"], "run", lambda self, edit: lowered.append("packed") or packs(self, edit))
    built: list[Program] = []
    build = Eager.build
    monkeypatch.setattr(Eager, "build", lambda self, program, sample: built.append(program) or build(self, program, sample))
    confirmed: list[Program] = []
    confirm = Eager.confirm

    def compare(self: Eager, executable: Executable, program: Program, example: Sample) -> None:
        confirmed.append(program)
        confirm(self, executable, program, example)

    monkeypatch.setattr(Eager, "confirm", compare)
    found = lissom.compile(model, INPUTS, passes=[Halve(), PASSES["low-rank"](rank=4)], goal=goal)
    history = found.report.history
    assert len(confirmed) == 1 and confirmed[0] is found.program
    assert len(lowered) == len(built) == 3  # the original and the program after each pass, once each
    assert any(program is found.program for program in built)
    assert [step.index for step in history.steps] == list(range(len(history.steps)))
    assert history.texts[-1] == found.program.text()
    assert (step_of(found, "halve").reverted is None) == (ratio < 1)
