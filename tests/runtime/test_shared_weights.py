"""Tests of a compiled model whose original is trained on."""

from __future__ import annotations

import copy

import pytest
import torch

import lissom
from lissom.errors import InputError
from tests.support.models import feed_forward, normal

CHANGED = (
    r"the weights of FeedForward were changed after it was compiled, first '\S+', and it holds packed copies of others; "
    r"compile it again, or compile copy\.deepcopy\(model\) to keep the weights as they are"
)


def train(model: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(normal(2, 5, 8)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("change", [train, lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()))])
def test_compiled_model_never_mixes_old_and_new_weights(change, tmp_path) -> None:
    model = feed_forward().model
    fast = lissom.compile(model, normal(2, 5, 8))
    fast(normal(2, 5, 8))
    change(model)
    with pytest.raises(InputError, match=CHANGED):
        fast(normal(2, 5, 8))
    with pytest.raises(InputError, match=CHANGED):
        fast.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    again = lissom.compile(model, normal(2, 5, 8))
    with torch.no_grad():
        torch.testing.assert_close(again(normal(2, 5, 8)), model(normal(2, 5, 8)), rtol=1e-5, atol=1e-6)  # float32 products


def test_a_copy_stays_as_it_is() -> None:
    model = feed_forward().model
    fast = lissom.compile(copy.deepcopy(model), normal(2, 5, 8))
    wanted = fast(normal(2, 5, 8))
    train(model)
    assert torch.equal(fast(normal(2, 5, 8)), wanted)
