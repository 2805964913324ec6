"""Tests of lissom.frontends.capture.isolation."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lissom.frontends.capture.export import capture
from lissom.frontends.capture.isolation import exchanged, with_own_modules
from tests.support.models import normal, seeded


def test_an_attribute_is_put_back_even_after_an_error():
    owner = SimpleNamespace(name="before")
    with pytest.raises(KeyError), exchanged(owner, "name", "meanwhile"):
        assert owner.name == "meanwhile"
        raise KeyError
    assert owner.name == "before"


def test_an_attribute_that_was_not_there_is_removed():
    owner = SimpleNamespace()
    with exchanged(owner, "name", "meanwhile"):
        assert owner.name == "meanwhile"
    assert not hasattr(owner, "name")


class Hooked(nn.Module):
    """Reads in its forward what hooks collected, as depth models do."""

    def __init__(self, *, bound: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.features: dict[str, torch.Tensor] = {}
        self.trunk[0].register_forward_hook(self.keep if bound else self.hook())

    def keep(self, module: nn.Module, args: object, output: torch.Tensor) -> None:
        self.features["first"] = output

    def hook(self):
        def keep(module: nn.Module, args: object, output: torch.Tensor) -> None:
            self.features["first"] = output

        return keep

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.trunk(x)
        return found + self.features["first"]


class Calls(nn.Module):
    """Calls a function that holds the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.step = partial(lambda x: self.linear(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x)


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize(
    ("make", "copied"),
    [(lambda: Hooked(bound=False), False), (lambda: Hooked(bound=True), True), (Calls, False)],
    ids=["closure", "bound", "call"],
)
def test_functions_that_hold_the_model_see_the_captured_values(make, copied, called_before):
    model = seeded(make).eval()
    with torch.no_grad():
        if called_before:
            model(normal(2, 5, 8, seed=3))
        kept = dict(getattr(model, "features", {}))
        program = capture(model, (normal(2, 5, 8),)).program
        assert all(model.features[name] is tensor for name, tensor in kept.items())
        for x in (normal(2, 5, 8), normal(3, 7, 8, seed=1)):
            torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-6)  # float32 products in another order
    assert (with_own_modules(model) is not model) == copied
