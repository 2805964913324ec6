"""Tests of share-layers: the oracle is the model itself with the weights of its layers exchanged by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.base import Backend
from lissom.backends.inductor import PACKAGE
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.compiler.pipeline.spelling import format_pass, parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes import PASSES
from lissom.passes.lightweight.share_layers import ShareLayers
from tests.support import captures
from tests.support.harness import check_golden, every_backend, every_backend_but_eager_slow, rewrite
from tests.support.models import Case, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from tests.support.neighbours import all_but_slow

STACKS = {
    "bert": (tiny_bert, "encoder.layer"), "gpt2": (tiny_gpt2, "h"), "llama": (tiny_llama, "model.layers"),
    "t5": (tiny_t5, "encoder.block"),
}  # fmt: skip


class Stack(nn.Module):
    """Several feed-forward blocks one behind the other."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeedForward() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def shared(module: nn.Module, inputs: object, options: str, data: Sequence[object] = ()) -> tuple[Program, Step]:
    found = captures.optimize(module, inputs, passes=f"exact,share-layers{{{options}}}", data=data)
    return found.program, found.report.history.steps[-1]


def by_hand(module: nn.Module, path: str, groups: Sequence[Sequence[int]], take: str) -> nn.Module:
    """A copy of the module of whose layers each group has the mean of its weights, or those of one."""
    changed = copy.deepcopy(module)
    layers = changed.get_submodule(path)
    for group in groups:
        names = set.intersection(*({name for name, _ in layers[index].named_parameters()} for index in group))
        for name in names:
            held = torch.stack([layers[index].get_parameter(name).detach().double() for index in group])
            value = {"mean": held.mean(0), "first": held[0], "middle": held[len(group) // 2], "last": held[-1]}[take]
            for index in group:
                layers[index].get_parameter(name).data.copy_(value)
    return changed


def outputs(case: Case, module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(**case.kwargs)[0]


def test_rewrites() -> None:
    program, step = shared(seeded(lambda: Stack(2)), normal(2, 5, 8), "groups=1")
    check_golden("share_layers", "\n".join([program.text(), step.summary, *step.notes]) + "\n")


def test_leaves_other_graphs_alone() -> None:
    module, x = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh())), normal(2, 8)
    program, history = rewrite(ShareLayers(groups=1), module, x)
    assert history.steps[-1].summary == "nothing to do"
    assert program.text() == history.texts[0]


CASES = [(name, take) for name in STACKS for take in ("mean", "last")]


@pytest.mark.parametrize(("name", "take"), all_but_slow(CASES, *(case for case in CASES if case != ("t5", "mean"))))
def test_numbers(name: str, take: str) -> None:
    build, path = STACKS[name]
    case = build()
    before = captures.optimize(case.model, case.inputs).program
    program, step = shared(case.model, case.inputs, f"groups=1,take={take}")
    assert step.summary == "rewrote 1"
    found = program(**case.kwargs)
    wanted = outputs(case, by_hand(case.model, path, [[0, 1]], take))
    # Sums in the order of the exact passes' operators, in float32.
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)
    assert program.parameter_bytes < 0.75 * before.parameter_bytes


@pytest.mark.parametrize(
    ("options", "groups"),
    [
        ("groups=1", [[0, 1, 2, 3, 4]]),
        ("groups=2", [[0, 1], [2, 3, 4]]),
        ("groups=4", [[0], [1], [2], [3, 4]]),
        ("every=2", [[0, 1], [2, 3], [4]]),
        ("every=3", [[0, 1, 2], [3, 4]]),
    ],
)
@pytest.mark.parametrize("take", ["mean", "first", "middle", "last"])
def test_layers_are_cut_into_groups_of_neighbours(options: str, groups: list[list[int]], take: str) -> None:
    module, x = seeded(Stack), normal(2, 5, 8)
    program, step = shared(module, x, f"{options},take={take}")
    assert step.rewritten == 5 - len(groups)
    assert [skip.reason for skip in step.skipped] == ["its group has one layer"] * sum(len(group) == 1 for group in groups)
    with torch.no_grad():
        torch.testing.assert_close(program(x), by_hand(module, "layers", groups, take)(x))
    one = sum(parameter.numel() for parameter in module.layers[0].parameters())
    assert program.parameter_count == one * len(groups)


def test_data_choose_what_costs_least() -> None:
    module, data = seeded(lambda: Stack(3)), [normal(4, 5, 8, seed=seed) for seed in range(3)]
    with torch.no_grad():
        # The last layer does next to nothing, so that its weights, or the mean, lose what the others do.
        module.layers[2].down.weight.mul_(1e-3)
        module.layers[1].down.weight.mul_(4)
        x = torch.cat(data)
        errors = {
            take: float((by_hand(module, "layers", [[0, 1, 2]], take)(x) - module(x)).norm() / module(x).norm())
            for take in ("mean", "first", "middle", "last")
        }
    _, step = shared(module, data[0], "groups=1", data)
    best = min(errors, key=errors.__getitem__)
    words = {"mean": "their mean", "first": "the weights of layers.0", "middle": "the weights of layers.1"}
    assert step.notes == (
        f"layers.0 to layers.2: 3 layers share {words[best]}; relative error of outputs {errors[best]:.2g}",
    )  # fmt: skip


def test_layers_that_are_alike_stay_as_they_are() -> None:
    module, x = seeded(lambda: Stack(3)), normal(2, 5, 8)
    for layer in module.layers:
        layer.load_state_dict(module.layers[0].state_dict())
    _, step = shared(module, x, "groups=1", [x])
    assert step.rewritten == 2 and step.relative_error < 1e-6


def test_layers_of_other_shapes_end_a_stack() -> None:
    module = seeded(lambda: Stack(4))
    module.layers[2] = seeded(lambda: FeedForward(8, 20))
    _, step = shared(module, normal(2, 5, 8), "groups=1")
    assert step.rewritten == 1
    assert [skip.reason for skip in step.skipped] == ["it has no neighbour with weights of the same shapes"] * 2


@pytest.mark.parametrize(
    ("options", "own"),
    [('skip="*.norm"', {"norm"}), ('only="*.up"', {"norm", "down"}), ('skip="layers.0"', {"norm", "up", "down"})],
)
def test_protected_weights_stay_their_layers_own(options: str, own: set[str]) -> None:
    program, _ = shared(seeded(lambda: Stack(2)), normal(2, 5, 8), f"groups=1,{options}")
    held = {name for name in program.weights() if name.startswith("layers.1.")}
    assert {name.split(".")[2] for name in held} == own


def test_it_trains_by_the_sum_of_the_gradients() -> None:
    module, x = seeded(lambda: Stack(2)), normal(2, 5, 8)
    program = shared(module, x, "groups=1,take=first")[0].own_copy()
    program(x).square().sum().backward()
    oracle = by_hand(module, "layers", [[0, 1]], "first")
    oracle(x).square().sum().backward()
    for name in ("up.weight", "down.bias", "norm.weight"):
        wanted = oracle.layers[0].get_parameter(name).grad + oracle.layers[1].get_parameter(name).grad
        torch.testing.assert_close(program.weight(f"layers.0.{name}").grad, wanted)


def test_the_model_keeps_its_weights() -> None:
    module, x = seeded(lambda: Stack(2)), normal(2, 5, 8)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    shared(module, x, "groups=1", [x])
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_requirements() -> None:
    x = normal(2, 5, 8)
    with pytest.raises(RequirementError, match="share-layers requires that weights of linear layers are floating point"):
        captures.optimize(seeded(lambda: Stack(2)), x, passes="quantize{scheme=int8-weight},share-layers{groups=1}")
    for options, message in (
        ({}, "takes exactly one of groups= and every=; groups=1 shares all, as ALBERT does"),
        ({"groups": 1, "every": 2}, "takes exactly one of groups= and every="),
        ({"groups": 0}, "takes groups= of 1 or more, not 0"),
        ({"every": 1}, "takes every= of 2 or more layers, not 1"),
    ):
        with pytest.raises(UnsupportedError) as refusal:
            ShareLayers(**options)
        assert str(refusal.value).startswith(f"share-layers {message}")


def test_options_are_spelt_as_they_are_written() -> None:
    text = "share-layers{every=2,take=mean}"
    (found,) = parse_pipeline(text, PASSES)
    assert (found, format_pass(found)) == (ShareLayers(every=2, take="mean"), text)


@every_backend_but_eager_slow
@pytest.mark.parametrize("build", all_but_slow([tiny_bert, tiny_llama], tiny_bert))
def test_composes(build: Callable[[], Case], backend: Backend) -> None:
    case = build()
    pruning = "prune-neurons{keep=0.5,criterion=magnitude},eliminate-dead"
    fast = captures.compile(case.model, case.inputs, passes=f"exact,share-layers{{groups=1}},{pruning}", backend=backend)
    spelled = {step.spelling.partition("{")[0]: step for step in fast.report.history.steps}
    assert spelled["share-layers"].rewritten == 1 and spelled["prune-neurons"].rewritten > 0
    with torch.no_grad():
        assert fast(**case.kwargs)[0].shape == case.model(**case.kwargs)[0].shape


def test_a_shared_weight_is_rounded_once() -> None:
    case = tiny_bert()
    found = captures.optimize(case.model, case.inputs, passes="exact,share-layers{groups=1},quantize{scheme=int8-weight}")
    assert found.report.history.steps[-1].rewritten == 6


@every_backend
def test_a_shared_weight_is_saved_once(tmp_path: Path, backend: Backend) -> None:
    """Wide enough for weights to be most of what is saved."""
    module, x = seeded(lambda: nn.Sequential(*(FeedForward(256, 1024) for _ in range(2)))), normal(2, 5, 256)
    one = sum(parameter.numel() * 4 for parameter in module[0].parameters())
    fast = captures.compile(module, x, passes="exact,share-layers{groups=1}", backend=backend)
    fast.save(tmp_path / "saved")
    # A backend may keep weights in the form it reads beside the program's own; each file holds a shared one once. TorchInductor
    # packs the weight of each layer for itself.
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file() and path.name != PACKAGE]
    assert max(path.stat().st_size for path in files) < 1.5 * one
    torch.testing.assert_close(lissom.load(tmp_path / "saved", allow_native=True)(x), fast(x))
