"""Tests of depthwise-separable: the layer as a whole is compared with one convolution by the kernel it stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.compiler.pipeline.spelling import format_pass, parse_pipeline
from lissom.errors import UnsupportedError
from lissom.passes import PASSES
from lissom.passes.lightweight.depthwise_separable.depthwise_separable import DepthwiseSeparable
from tests.passes.lightweight.depthwise_separable.test_factors import best, layout_of
from tests.passes.lightweight.models import (
    smooth,
    stem,
    tiny_conformer,
    tiny_convbert,
    tiny_segformer,
    tiny_vit,
    tiny_wav2vec2,
    tiny_whisper,
)
from tests.support import captures
from tests.support.calibrated import exact, passed
from tests.support.harness import Calls, calls, check_golden, every_backend_but_eager_slow, rewrite, simulates
from tests.support.models import Case, normal, seeded, tiny_bert
from tests.support.neighbours import all_but_slow

aten = torch.ops.aten


def separated(module: nn.Module, x: torch.Tensor, options: str, data: list[torch.Tensor] | None = None) -> tuple[Program, Step]:
    found = captures.optimize(module, x, passes=f"depthwise-separable{{{options}}}", data=data or ())
    return found.program, found.report.history.steps[-1]


def relative(found: object, wanted: torch.Tensor) -> float:
    assert isinstance(found, torch.Tensor)
    return float((found - wanted).norm() / wanted.norm())


def test_rewrites() -> None:
    program, step = separated(stem(), normal(2, 6, 9), "rank=1")
    check_golden("depthwise_separable", "\n".join([program.text(), step.summary, *step.notes]) + "\n")


def test_leaves_other_graphs_alone() -> None:
    after, history = passed(tiny_bert, "depthwise-separable{rank=1}")
    assert after.text() == exact(tiny_bert).text()
    assert history.steps[-1].summary == "nothing to do"


def test_depthwise_and_pointwise_ones_are_left_alone() -> None:
    case = tiny_convbert()
    _, step = separated_case(case, "rank=1")
    assert step.summary == (
        "rewrote 0 of 2; skipped 2: it is depthwise already, its kernel has one element per channel, so it is pointwise already"
    )


def separated_case(case: Case, options: str) -> tuple[Program, Step]:
    found = captures.optimize(case.model, case.inputs, passes=f"exact,depthwise-separable{{{options}}}")
    return found.program, found.report.history.steps[-1]


GEOMETRIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(6, 12, 3), (2, 6, 11)),
    "1d strided": (lambda: nn.Conv1d(6, 12, 5, stride=2, padding=2), (2, 6, 13)),
    "1d dilated": (lambda: nn.Conv1d(6, 12, 3, dilation=3, padding=1, bias=False), (2, 6, 17)),
    "1d groups": (lambda: nn.Conv1d(6, 12, 8, groups=3, padding=4), (2, 6, 11)),
    "1d same": (lambda: nn.Conv1d(6, 12, 4, padding="same", dilation=2), (2, 6, 11)),
    "1d one channel": (lambda: nn.Conv1d(1, 12, 10, stride=5), (2, 1, 33)),
    "2d": (lambda: nn.Conv2d(6, 12, 3, padding=1), (2, 6, 7, 9)),
    "2d strided": (lambda: nn.Conv2d(6, 12, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 6, 9, 7)),
    "2d patches": (lambda: nn.Conv2d(3, 12, 4, stride=4), (2, 3, 12, 16)),
    "2d groups, dilated": (lambda: nn.Conv2d(6, 12, (3, 2), groups=2, dilation=(2, 1)), (2, 6, 9, 7)),
    "2d valid": (lambda: nn.Conv2d(6, 12, 3, padding="valid"), (2, 6, 7, 7)),
    "2d reflected": (lambda: nn.Conv2d(6, 12, 3, padding=1, padding_mode="reflect"), (2, 6, 7, 7)),
    "3d": (lambda: nn.Conv3d(3, 12, (2, 3, 3), stride=(2, 1, 1)), (2, 3, 4, 5, 6)),
}


@pytest.mark.parametrize("order", ["depthwise-first", "pointwise-first"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_numbers(name: str, order: str) -> None:
    """What comes out is the same convolution with each slice of its kernel cut to the terms that are kept."""
    build, shape = GEOMETRIES[name]
    module, x = seeded(build), normal(*shape)
    program, step = separated(module, x, f"rank=1,order={order}")
    if not step.rewritten:
        assert step.skipped[0].reason.endswith("of its operations; both must be less")
        return
    kernel = module.weight.detach()
    layout = layout_of(order, tuple(kernel.shape[2:]), module.groups, module.in_channels, module.out_channels)
    cut = seeded(build)
    with torch.no_grad():
        cut.weight.copy_(best(layout, kernel.double(), 1))
        wanted = cut(x)
        # Sums of the products of two convolutions in place of one, in float32.
        torch.testing.assert_close(program(x), wanted, rtol=1e-4, atol=1e-5)
    error = float((kernel - cut.weight.detach()).norm() / kernel.norm())
    assert f"relative kernel error {error:.2g}" in step.notes[0]


@pytest.mark.parametrize("order", ["auto", "depthwise-first", "pointwise-first"])
@pytest.mark.parametrize("with_data", [False, True])
def test_a_kernel_that_is_separable_stays_as_it_is(with_data: bool, order: str) -> None:
    module, x = stem(), smooth(2, 6, 30)
    with torch.no_grad():
        for layer in (module.first, module.second):
            channels = layer.weight.shape[:2]
            if order == "pointwise-first":
                layer.weight.copy_(normal(channels[0], channels[1], 1) * normal(channels[0], 1, 3, seed=1))
            else:
                layer.weight.copy_(normal(channels[0], channels[1], 1) * normal(1, channels[1], 3, seed=1))
    data = [smooth(2, 6, 30, seed=seed) for seed in range(3)] if with_data else None
    program, step = separated(module, x, f"rank=1,order={order}", data)
    assert step.rewritten == 2
    with torch.no_grad():
        # Float16 holds what layers read between two samples.
        assert relative(program(x), module(x)) < (2e-4 if with_data else 1e-6)


def test_data_make_it_err_less() -> None:
    """On other inputs of the same kind: smooth ones, so that the taps of a kernel meet nearly the same values."""
    module, held_out = stem(), smooth(8, 6, 60, seed=99)
    data = [smooth(4, 6, 60, seed=seed) for seed in range(6)]
    with torch.no_grad():
        wanted = module(held_out)
        plain, _ = separated(module, held_out, "rank=1")
        fitted, step = separated(module, held_out, "rank=1", data)
        assert relative(fitted(held_out), wanted) < 0.4 * relative(plain(held_out), wanted)
        found = float(step.notes[-1].rpartition("output error ")[2].split()[0])
        # What is reported is the error of a fit to half of the samples on the other half, and these are others still.
        given = wanted - module.second.bias[:, None]
        assert relative(fitted(held_out) - module.second.bias[:, None], given) == pytest.approx(found, rel=0.2)


def test_a_layer_makes_up_for_those_before_it() -> None:
    """The second is fitted to what it gave in the model, on what it reads behind the first, which has lost much."""
    module, x = stem(), normal(64, 6, 33)
    program, _ = separated(module, x, "rank=1,order=depthwise-first", [x])
    with torch.no_grad():
        first = nn.functional.conv1d(x, program.weight("first.weight_depthwise"), padding=1, groups=6)
        read = nn.functional.gelu(nn.functional.conv1d(first, program.weight("first.weight_pointwise"), module.first.bias))
        z = nn.functional.conv1d(read, program.weight("second.weight_depthwise"), stride=2, padding=1, groups=8)
        y = (module(x) - module.second.bias[:, None]).transpose(1, 2).flatten(0, 1).double()
        z = z.transpose(1, 2).flatten(0, 1).double()
        least = relative(z @ torch.linalg.lstsq(z, y).solution, y)
        assert least <= relative(z @ program.weight("second.weight_pointwise")[..., 0].double().T, y) < 1.02 * least


@pytest.mark.parametrize(("budget", "share"), [(0.5, 0.5), (0.75, 0.75), (0.9, 0.9)])
def test_a_budget_bounds_the_bytes_of_each_layer(budget: float, share: float) -> None:
    module, x = seeded(lambda: nn.Conv1d(32, 32, 9, bias=False)), normal(2, 32, 20)
    program, _ = separated(module, x, f"budget={budget}")
    assert share - 0.15 < program.parameter_bytes / (32 * 32 * 9 * 4) <= share
    found = captures.optimize(module, x, passes=f"depthwise-separable{{budget={budget}}}").report.history.steps
    assert found[-1].size.flops / found[0].size.flops <= share


def test_energy_that_is_kept_bounds_the_error() -> None:
    module, x = seeded(lambda: nn.Conv2d(32, 32, 5, bias=False)), normal(2, 32, 9, 9)
    for keep in (0.3, 0.6, 0.8):
        _, step = separated(module, x, f"keep={keep}")
        found = float(step.notes[0].rpartition("kernel error ")[2].split()[0])
        # Printed with two digits; one term holds some hundredths of such a kernel.
        assert (1 - keep - 0.08) ** 0.5 <= found <= (1 - keep) ** 0.5 + 0.006


def test_the_order_that_errs_less_is_taken() -> None:
    """A kernel whose outputs have one tap pattern each is separable with pointwise first alone."""
    module, x = seeded(lambda: nn.Conv1d(8, 8, 5, padding=2)), normal(2, 8, 20)
    with torch.no_grad():
        module.weight.copy_(normal(8, 8, 1) * normal(8, 1, 5, seed=1))
    program, step = separated(module, x, "rank=1")
    assert step.notes[0].startswith("conv1d: pointwise-first, 1 term, 32% of its bytes and 32% of its operations")
    with torch.no_grad():
        assert relative(program(x), module(x)) < 1e-6


def test_more_terms_than_there_are_save_nothing() -> None:
    _, step = separated(stem(), normal(2, 6, 9), "rank=9")
    assert step.summary.startswith("rewrote 0 of 2; skipped 2: 3 terms take ")


def test_patches_of_few_outputs_are_left_alone() -> None:
    module = seeded(lambda: nn.Conv2d(3, 4, 2, stride=2))
    _, step = separated(module, normal(2, 3, 8, 8), "budget=0.4")
    assert [skip.reason for skip in step.skipped] == [
        "one term takes 50% of its bytes and 50% of its operations, over budget=0.4"
    ]


@pytest.mark.parametrize(("pattern", "treated"), [("skip=first", "second"), ("only=first", "first")])
def test_protected_layers_are_left_alone(pattern: str, treated: str) -> None:
    program, step = separated(stem(), normal(2, 6, 9), f"rank=1,{pattern}")
    assert step.rewritten == 1 and step.skipped[0].reason in ("skip= names it", "only= does not name it")
    assert f"{treated}.weight" not in program.weights()
    assert sum(name.endswith("wise") for name in program.weights()) == 2


class Others(nn.Module):
    """A kernel that two convolutions share, one that is computed, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.gated = nn.Parameter(normal(8, 8, 3)), nn.Parameter(normal(8, 8, 3, seed=1))
        self.back = nn.ConvTranspose1d(8, 8, 3)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        x = nn.functional.conv1d(nn.functional.conv1d(x, self.shared).relu(), self.shared)
        return self.back(nn.functional.conv1d(x, self.gated * gate))


def test_products_without_their_own_kernel_are_left_alone() -> None:
    _, history = rewrite(DepthwiseSeparable(rank=1), Others().eval(), normal(2, 8, 20), normal(8, 1, 1))
    reasons = [skip.reason for skip in history.steps[-1].skipped]
    assert reasons == [
        "its kernel is read elsewhere too",
        "its kernel is read elsewhere too",
        "its kernel is computed by the program, cast or quantized; put this pass before the one that did this",
        "it is a transposed convolution",
    ]


def test_requirements() -> None:
    for options, message in (
        ({}, "takes one of rank=, keep= and budget=, and was given none"),
        ({"rank": 1, "budget": 0.5}, "takes one of rank=, keep= and budget=, and was given rank= and budget="),
        ({"rank": 0}, "takes rank= of 1 or more, not 0"),
        ({"keep": 1.5}, "keeps a fraction of the energy above 0 and up to 1, not keep=1.5"),
        ({"budget": 1.0}, "leaves a fraction of the bytes above 0 and below 1, not budget=1"),
    ):
        with pytest.raises(UnsupportedError) as refusal:
            DepthwiseSeparable(**options)
        assert str(refusal.value).startswith(f"depthwise-separable {message}")


def test_options_are_spelt_as_they_are_written() -> None:
    text = 'depthwise-separable{budget=0.5,order=pointwise-first,skip="a,b"}'
    (found,) = parse_pipeline(text, PASSES)
    assert found == DepthwiseSeparable(budget=0.5, order="pointwise-first", skip="a,b")
    assert format_pass(found) == text


MODELS = {
    "vit": (tiny_vit, 1), "segformer": (tiny_segformer, 3), "wav2vec2": (tiny_wav2vec2, 3), "conformer": (tiny_conformer, 2),
    "whisper": (tiny_whisper, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", all_but_slow(MODELS, "vit", "segformer", "wav2vec2"))
def test_transformers_get_smaller(name: str) -> None:
    """With their batch left free, and at the sizes the checks are made with."""
    build, convolutions = MODELS[name]
    case = build()
    found = captures.optimize(case.model, case.inputs, passes="exact,depthwise-separable{rank=1}", data=[case.inputs])
    before, step = found.report.history.steps[-2:]
    assert step.rewritten == convolutions
    assert step.size.parameter_bytes < before.size.parameter_bytes and step.size.flops < before.size.flops


def test_kernel_with_weight_normalisation_is_plain_one_by_then() -> None:
    program, step = separated_case(tiny_wav2vec2(), "rank=2,order=depthwise-first,only=encoder.pos_conv_embed")
    assert step.rewritten == 1
    assert {name: tuple(program.weight(name).shape) for name in program.weights() if name.endswith("wise")} == {
        "folded._weight_norm_depthwise": (32, 1, 8),
        "folded._weight_norm_pointwise": (16, 16, 1),
    }


def test_it_trains() -> None:
    module, x = stem(), smooth(16, 6, 30)
    program = separated(module, x, "rank=1")[0].own_copy()
    factors = [program.weight(name) for name in program.weights() if name.endswith("wise")]
    optimizer = torch.optim.Adam(factors, lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        loss = (program(x) - module(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(float(factor.grad.abs().sum()) > 0 for factor in factors)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_kernels_stay_frozen() -> None:
    module = stem().requires_grad_(False)
    program, _ = separated(module, normal(2, 6, 9), "rank=1")
    assert not any(weight.requires_grad for weight in program.own_copy().weights().values())


def test_the_model_keeps_its_weights() -> None:
    module, x = stem(), smooth(2, 6, 30)
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    separated(module, x, "rank=1", [x])
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())


def test_one_sample_without_a_batch_is_taken() -> None:
    module, x = stem(), smooth(1, 6, 30)[0]
    found = captures.optimize(module, x, passes="depthwise-separable{rank=1}", data=[x], dynamic=False)
    assert found.report.history.steps[-1].rewritten == 2


@every_backend_but_eager_slow
@pytest.mark.parametrize("build", all_but_slow([tiny_wav2vec2, tiny_segformer], tiny_segformer))
def test_composes(build: Callable[[], Case], backend: Backend) -> None:
    case = build()
    passes = "exact,prune-neurons{keep=0.5,criterion=magnitude},eliminate-dead,depthwise-separable{budget=0.6},quantize"
    options = {"passes": passes, "data": [case.inputs], "backend": backend, "simulate": simulates(backend)}
    fast = captures.compile(case.model, case.inputs, **options)
    spelled = {step.spelling.partition("{")[0]: step for step in fast.report.history.steps}
    assert spelled["depthwise-separable"].rewritten > 0 and spelled["quantize"].rewritten > 0
    with torch.no_grad():
        assert fast(**case.kwargs).last_hidden_state.shape == case.model(**case.kwargs).last_hidden_state.shape


def test_it_goes_before_a_cast_and_not_behind_it() -> None:
    x = normal(2, 6, 9)
    found = captures.optimize(stem(), x, passes="depthwise-separable{rank=1},cast{dtype=bf16}")
    assert calls(found.program, aten.conv1d.default) == 4
    module = Calls(lambda self, x: nn.functional.conv1d(x, self.w.to(x.dtype)), w=normal(8, 6, 3).bfloat16())
    _, history = rewrite(DepthwiseSeparable(rank=1), module, x)
    assert [skip.reason for skip in history.steps[-1].skipped] == [
        "its kernel is computed by the program, cast or quantized; put this pass before the one that did this"
    ]
