"""Metrics of decoders that read the logits of all positions."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.errors import InputError
from tests.support.decoders import decoder, prompt

pytestmark = pytest.mark.usefixtures("shared_captures")


def test_perplexity_of_all_positions_is_a_bound() -> None:
    """The metric sees the logits of every token of padded texts, before and after lossy passes."""
    model, errors = decoder("llama"), []
    given = prompt(2, padding=2)
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        wanted = model(**given).logits

    def minus_perplexity(logits_of) -> float:
        logits = logits_of(ids, mask, all_positions=True)
        errors.append(float((logits - wanted)[mask.bool()].abs().max()))
        kept = (mask[:, 1:] * mask[:, :-1]).bool()
        surprise = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -float(surprise[kept].mean().exp())

    fast = lissom.compile_generation(
        model, max_length=32, batch=2, passes="quantize-cache", metric=minus_perplexity, max_drop=1e3, goal=None, simulate=True,
    )  # fmt: skip
    assert len(errors) == 2
    assert errors[0] < 1e-5 < errors[1]
    # The last layer is narrowed to the last token after the metric's last call.
    steps = [step.spelling for step in fast.report.history.steps]
    assert steps.index("quantize-cache") < steps.index("eliminate-dead-tokens")
    assert fast.step(ids, mask).shape == (2, wanted.shape[-1])


def test_a_metric_reads_every_text_from_an_empty_state() -> None:
    texts = [prompt(length=length)["input_ids"] for length in (6, 4)]
    found = []

    def metric(logits_of) -> float:
        found.append([logits_of(ids) for ids in (*texts, texts[0])])
        return 1.0

    fast = lissom.compile_generation(decoder("mamba2"), max_length=16, metric=metric, goal=None)
    for first, other, again in found:
        assert torch.equal(first, again) and not torch.equal(first, other)
    fast.reset()
    torch.testing.assert_close(fast.step(texts[1]), found[-1][1], rtol=0, atol=1e-5)


def test_a_text_longer_than_the_cache_is_refused() -> None:
    ids = torch.zeros(1, 20, dtype=torch.int64)
    with pytest.raises(InputError, match="metric gave a text of 20 tokens; this decoder reads 16 or fewer"):
        lissom.compile_generation(decoder("llama"), max_length=16, metric=lambda logits_of: float(logits_of(ids).sum()))
