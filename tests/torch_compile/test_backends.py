"""Every mode and backend of `torch.compile(model, backend="lissom")` gives what the model gives, at all sizes."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import lissom
from tests.support.models import FeedForward, normal, seeded
from tests.support.neighbours import all_but_slow
from tests.torch_compile.test_torch_compile import TOLERANCE, compiled, error, fresh, lowered

__all__ = ["fresh"]


class Named(nn.Module):
    """Two layers, and a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FeedForward(), FeedForward()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.second(self.first(x))
        return {"states": x, "mean": x.mean(1)}


MODELS = {
    "linear": lambda: nn.Linear(8, 4),
    "sequential": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
    "block": FeedForward,
    "named": Named,
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
}
HOW = {
    "eager": {"options": {"backend": "eager"}},
    "onnxruntime": {"options": {"backend": "onnxruntime"}},
    "inductor": {"options": {"backend": "inductor"}},
    "fastest": {"options": {"backend": "fastest"}},
    "default": {"mode": "default"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "max-autotune": {"mode": "max-autotune"},
}
QUICK = {("eager", name) for name in MODELS} | {
    ("onnxruntime", "linear"),
    ("onnxruntime", "named"),
    ("reduce-overhead", "block"),
}
CASES = all_but_slow([(how, name) for how in HOW for name in MODELS], *QUICK)


@pytest.mark.parametrize(("how", "name"), CASES)
def test_sizes(how: str, name: str) -> None:
    model = seeded(MODELS[name]).eval()
    fast = compiled(model, **HOW[how])
    # ONNX has none of the operators that torch.nn makes of a whole layer.
    runs = (how, name) != ("onnxruntime", "encoder")
    with torch.no_grad(), nullcontext() if runs else pytest.warns(UserWarning, match="runs Graph_0_. as it is: ONNX Runtime"):
        for rows, length in ((2, 5), (3, 7), (1, 4), (3, 1)):
            assert error(model(x := normal(rows, length, 8)), fast(x)) <= TOLERANCE
    assert not runs or all(lowered())


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("how", "name"), [("eager", "named"), ("onnxruntime", "block")])
def test_sizes_that_are_asked_to_vary_or_not(how: str, name: str, dynamic: bool) -> None:
    model = seeded(MODELS[name]).eval()
    fast = compiled(model, dynamic=dynamic, **HOW[how])
    with torch.inference_mode():
        for rows, length in ((2, 5), (3, 7)):
            x = normal(rows, length, 8)
            assert error(model(x), fast(x)) <= TOLERANCE
    assert lowered() == [True] * (1 if dynamic else 2)


@pytest.mark.parametrize(("how", "name"), [("eager", "named"), ("onnxruntime", "sequential")])
def test_a_model_in_training(how: str, name: str) -> None:
    model = seeded(MODELS[name])
    fast = compiled(model, **HOW[how])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows, length in ((2, 5), (3, 7)):
        x = normal(rows, length, 8)
        wanted = _gradients(model, model, x)
        with warnings.catch_warnings(action="ignore"):
            found = _gradients(model, fast, x)
        assert max(map(error, wanted, found)) <= TOLERANCE
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert error(model(x), fast(x)) <= TOLERANCE
    assert lowered()[-1] and lissom.dynamo_reports()[0].reason is not None


def _gradients(model: nn.Module, called: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    found = called(x)
    (found["states"] if isinstance(found, dict) else found).square().mean().backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
