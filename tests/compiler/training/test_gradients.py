"""Tests of gradients in half precision: those of float32 up to rounding, scaled against underflow, and skipped on overflow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.training.gradients import Gradients, Loss, LossScale
from lissom.compiler.training.lm_head import Trunk
from lissom.compiler.training.loop import Plan, Run, Trained
from lissom.compiler.training.ranks import Ranks
from tests.support.models import normal, seeded
from tests.support.neighbours import all_but_slow
from tools.zoo import catalogue
from tools.zoo.removal import canonical


def gradients(learned: dict[str, nn.Parameter], loss: Loss, precision: str, factor: float = 1.0) -> torch.Tensor:
    """All gradients of the parameters that have one, [elements], divided by the factor."""
    Gradients(learned, {}, loss, Ranks(), None).compute(0, 0.0, precision, factor)
    return torch.cat([item.grad.flatten() / factor for item in learned.values() if item.grad is not None])


def test_a_scale_keeps_small_gradients_of_float16() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)))

    def loss(*_: object) -> torch.Tensor:
        return 1e-7 * model(normal(5, 8)).float().square().mean()

    learned = dict(model.named_parameters())
    wanted = gradients(learned, loss, "fp32")
    assert not gradients(learned, loss, "fp16").any()
    found = gradients(learned, loss, "fp16", LossScale().factor * 2**8)
    assert found.dtype == torch.float32
    # Some roundings to 11 bits each.
    assert (found - wanted).norm() <= 5e-3 * wanted.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "name",
    all_but_slow(
        ("masked/bert", "masked/electra", "causal/llama", "causal/gpt2", "causal/gemma2", "causal/gpt_oss", "causal/mamba2",
         "encoder-decoder/t5", "vision/vit", "vision/swinv2", "speech/hubert", "hand-written/softcap"),
        "masked/bert",
    ),
)  # fmt: skip
def test_gradients_are_those_of_float32(name: str, precision: str) -> None:
    entry = next(entry for entry in catalogue.entries() if entry.name == name)
    program, samples = canonical(entry.build())
    program = program.own_copy()
    trunk = Trunk.of(program, {}, "test")
    learned = {name: item for name, item in program.weights().items() if item.requires_grad}

    def loss(*_: object) -> torch.Tensor:
        found = [item for item in trunk.run(samples[0]) if isinstance(item, torch.Tensor) and item.requires_grad]
        return torch.stack([item.float().square().mean() for item in found]).sum()

    wanted, scale = gradients(learned, loss, "fp32"), LossScale(1.0 if precision == "bf16" else 2.0**16)
    while not (found := gradients(learned, loss, precision, scale.factor)).isfinite().all():
        assert scale.halve()
    # Roundings of many layers, to 8 bits each or to 11.
    assert (found - wanted).norm() <= (0.1 if precision == "bf16" else 0.02) * wanted.norm()


def run_in_float16(loss, steps: int) -> tuple[list[torch.Tensor], Trained]:
    """Train a weight [4] from ones; returns what it was at each step."""
    weight, seen = nn.Parameter(torch.ones(4)), list[torch.Tensor]()

    def recorded(*_: object) -> torch.Tensor:
        seen.append(weight.detach().clone())
        return loss(weight)

    found = Run({"": weight}, {}, recorded, 1, lambda: 1.0, Plan(None, steps, 0.01, "fp16", 0), lambda *_: None).train()
    return seen, found


def test_a_step_that_overflows_changes_nothing_but_the_scale() -> None:
    """The gradient is 8 times the scale: above 65,504, the largest number of float16, until the scale is 4,096."""
    seen, found = run_in_float16(lambda weight: 4 * nn.functional.linear(weight, torch.full((1, 4), 2.0)).sum(), 7)
    assert found.scale == LossScale(4096.0, lasted=3, skipped=4)
    assert found.stopped is None
    assert [bool((weight == 1).all()) for weight in seen] == [True] * 5 + [False] * 2


def test_a_gradient_that_is_never_finite_ends_the_run() -> None:
    """The derivative of the root at zero is infinite: after a scale of 1 the scale is not to blame."""
    seen, found = run_in_float16(lambda weight: (0 * weight.sum()).sqrt() + weight.sum(), 60)
    assert all(bool((weight == 1).all()) for weight in seen)
    assert found.stopped == (
        "the loss or its gradient was not finite after 16 steps, in float16 where numbers end at 65,504; "
        "precision=bf16 has the range of float32"
    )


@pytest.mark.parametrize(("steps", "factor"), [(1999, 2.0**16), (2000, 2.0**17)])
def test_the_scale_grows_after_many_steps(steps, factor) -> None:
    scale = LossScale()
    for _ in range(steps):
        scale.keep()
    assert (scale.factor, scale.skipped) == (factor, 0)
