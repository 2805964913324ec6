"""Tests of lissom.tune_generation on a small Llama: the bound, the text, and calls that are refused."""

from __future__ import annotations

import math

import pytest
import torch

import lissom
from lissom.errors import InputError, UnsupportedError
from lissom.tuning.generation import divided, perplexity_of_prompts
from tests.support.decoders import decoder, prompt
from tests.support.models import tiny_llama, tokens


def texts(count=4):
    return [tokens(seed=seed) for seed in range(count)]


def perplexity(decoder, chosen):
    losses = []
    for ids in chosen:
        for row in ids:
            decoder.reset()
            logits = decoder.step(row[None])[0, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.float(), row[1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.mark.slow
def test_the_text_gives_the_decoder_again_within_the_bound():
    model, data = tiny_llama().model, texts()
    tuned = lissom.tune_generation(model, max_length=16, data=data, goal="memory", max_drop=0.05, minutes=0.5, distill=False)
    assert tuned.report.chosen.bytes < tuned.report.candidates[0].bytes
    options = {"max_length": 16, "all_logits": True, "goal": None}
    judged = [text["input_ids"] for text in lissom.generation.compile.named_prompts(data, 1, 16)[::2]]
    before = perplexity(lissom.compile_generation(model, **options), judged)
    again = lissom.compile_generation(model, passes=tuned.pipeline, data=tuned.calibration, **options)
    change = torch.tensor(perplexity(again, judged) / before).log()
    assert float(change) == pytest.approx(tuned.report.chosen.drop, abs=1e-4)
    assert float(change) <= 0.05
    prompt = tokens()[:1]
    again.reset()
    one, other = tuned.best.step(prompt), again.step(prompt)[:, -1]
    # The last layer of `best` computes one token, in sums of another order; eight-bit activations then round to neighbours.
    assert float((one - other).norm() / other.norm()) < 0.05


def test_perplexity_takes_texts_with_labels():
    decoder = lissom.compile_generation(tiny_llama().model, max_length=16, all_logits=True, goal=None)
    plain = [{"input_ids": ids} for ids in texts(2)]
    scores = [
        perplexity_of_prompts(lissom.generation.compile.named_prompts(given, 1, 16))(decoder.compiled)
        for given in (plain, [{**text, "labels": text["input_ids"]} for text in plain])
    ]
    assert scores[0] == scores[1] < 0


@pytest.mark.parametrize(("most", "calibrating"), [(math.inf, [1, 3, 5]), (20, [1, 3]), (1, [1])])
def test_every_second_text_calibrates_until_there_are_enough_tokens(most, calibrating):
    given = lissom.generation.compile.named_prompts([tokens(1, 10, seed) for seed in range(7)], 1, 16)
    places = {id(text): place for place, text in enumerate(given)}
    found = [[places[id(text)] for text in part] for part in divided(given, most)]
    assert found == [[place for place in range(7) if place not in calibrating], calibrating]


@pytest.mark.slow
def test_a_decode_step_is_what_is_timed():
    tuned = lissom.tune_generation(tiny_llama().model, max_length=16, data=texts(2), minutes=0.1, distill=False, metric=None)
    assert "pack-tokens" not in tuned.pipeline
    assert tuned.best.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False).shape == (1, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"goal": "latency"}, UnsupportedError, "choose decode, prefill, memory"),
        ({"metric": "bleu"}, UnsupportedError, "give 'perplexity', a function, or None"),
        ({"data": None}, InputError, "data="),
        ({"data": [torch.ones(1, 1, dtype=torch.long)] * 4}, InputError, "data= has texts of one token"),
        ({"batch": 4, "data": [torch.ones(6, 4, dtype=torch.long)]}, InputError, "data= holds 1 batch of 4 rows"),
        ({"data": [torch.ones(1, 4, dtype=torch.long)]}, InputError, "data= holds 1 batch of 1 rows"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, sentence):
    given = {"max_length": 16, "data": texts(2)} | arguments
    with pytest.raises(error, match=sentence):
        lissom.tune_generation(tiny_llama().model, **given)


def test_every_text_is_read_by_itself():
    """The state of a recurrence that one text leaves is not what the next one starts with."""
    given = prompt(2)["input_ids"]
    fast = lissom.compile_generation(decoder("mamba2"), max_length=16, all_logits=True, goal=None)
    scores = []
    metric = perplexity_of_prompts(lissom.generation.compile.named_prompts([given], 1, 16))
    for _ in range(2):
        scores.append(metric(fast.compiled))
    assert scores[0] == scores[1]
    rows = [perplexity_of_prompts(lissom.generation.compile.named_prompts([row[None]], 1, 16))(fast.compiled) for row in given]
    assert scores[0] == pytest.approx(sum(rows) / 2, rel=1e-6)
