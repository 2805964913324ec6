"""Tests of compiled decoders whose layers keep the state of a recurrence."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.errors import InputError, UnsupportedError
from tests.generation.test_generation import compiled
from tests.support.decoders import decoder, prompt

pytestmark = pytest.mark.usefixtures("shared_captures")


def test_recurrent_state_is_reset_and_reordered_but_not_cropped() -> None:
    model, fast = compiled("qwen3_next", batch=2)
    ids = prompt(2)["input_ids"]
    fast.reset()
    wanted = fast.step(ids)
    with pytest.raises(
        UnsupportedError, match=r"the state of a recurrence cannot be cropped \(7 tokens are read, 3 were to stay\)"
    ):
        fast.crop(3)
    fast.crop(0)
    assert torch.equal(fast.step(ids), wanted)
    fast.reorder(torch.tensor([1, 0]))
    found = fast.step(ids[:, :1])
    fast.reset()
    fast.step(ids.flip(0))
    # The convolution adds in another order where rows change places.
    torch.testing.assert_close(fast.step(ids[:, :1]), found, rtol=0, atol=1e-5)
    beams = {"num_beams": 2, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = prompt()
    assert torch.equal(fast.generate(**inputs, **beams), model.generate(**inputs, **beams))


def test_a_recurrent_model_is_compiled_under_inference_mode() -> None:
    model = decoder("mamba2")
    with torch.inference_mode():
        fast = lissom.compile_generation(model, max_length=16)
        inputs = prompt(length=5)
        wanted = model(inputs["input_ids"]).logits[:, -1]
        # Sums of some hundred products in float32, through two layers.
        torch.testing.assert_close(fast.step(inputs["input_ids"]), wanted, rtol=0, atol=2e-5)


def test_an_interrupted_call_leaves_no_state_that_is_used(monkeypatch) -> None:
    fast = lissom.compile_generation(decoder("mamba2"), max_length=16)
    ids = prompt(length=5)["input_ids"]
    wanted = fast.step(ids)

    def interrupted(inputs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fast.compiled, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fast.step(ids[:, :1])
    with pytest.raises(UnsupportedError, match=r"was interrupted while it wrote the state of recurrent layers; reset\(\)"):
        fast.step(ids[:, :1])
    fast.reset()
    assert torch.equal(fast.step(ids), wanted)


def test_a_quantized_cache_can_be_cropped() -> None:
    model = decoder("llama")
    fast = lissom.compile_generation(model, max_length=16, passes="quantize-cache", goal=None)
    ids = prompt(length=5)["input_ids"]
    fast.step(ids)
    wanted = fast.step(ids[:, :1])
    fast.crop(5)
    assert torch.equal(fast.step(ids[:, :1]), wanted)


def test_a_wrong_token_leaves_the_state_as_it_was() -> None:
    fast = lissom.compile_generation(decoder("mamba2"), max_length=16)
    ids = prompt(length=5)["input_ids"]
    fast.step(ids)
    with pytest.raises(InputError):
        fast.step(torch.tensor([[10_000]]))
    found = fast.step(ids[:, :1])
    fast.reset()
    torch.testing.assert_close(found, fast.step(torch.cat([ids, ids[:, :1]], 1)), rtol=0, atol=2e-5)
