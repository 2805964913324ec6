"""Tests of speculative decoding without a model: what is proposed, how many tokens, and the distribution of samples."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lissom.generation.choice import Choice
from lissom.generation.pace import FIRST, LONGEST_PAUSE, SHORTEST_PAUSE, Pace
from lissom.generation.proposers import PromptLookup
from lissom.generation.speculate import Drafts
from tests.support.neighbours import all_but_slow

DRAWS = 100_000
LOGITS = torch.tensor([[1.0, 0.2, -0.5, 0.9, -2.0, 0.4]])
DRAFT_LOGITS = torch.tensor([[-0.3, 1.5, 0.0, 0.8, -1.0, 0.5]])
TEXT = torch.zeros(1, 3, dtype=torch.int64)
WARPERS = {
    "plain": [],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "top-k": [TopKLogitsWarper(4), TemperatureLogitsWarper(1.3)],
    "top-p": [TopPLogitsWarper(0.8)],
}
# The statistic of a right sampler is above it once in a million seeds, for up to 5 degrees of freedom.
CHI_SQUARE = 35.9


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The statistic of the outcomes that have a probability; the others must not occur."""
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0
    expected = probabilities[possible].double() * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum())


QUICK = [("plain", "sampled"), ("top-p", "given")]
SETTINGS = [(name, drafted) for name in WARPERS for drafted in ("sampled", "given")]


@pytest.mark.parametrize(("name", "drafted"), all_but_slow(SETTINGS, *QUICK))
def test_verified_samples_have_the_distribution_of_the_scores(name: str, drafted: str) -> None:
    warpers = LogitsProcessorList(WARPERS[name])
    warp = partial(warpers, TEXT)
    draw = torch.Generator().manual_seed(5)
    choice = Choice(lambda text, logits: warpers(text, logits), samples=True, warp=warp, generator=draw)
    counts, accepted = torch.zeros(6, dtype=torch.int64), 0
    scores = choice.process(TEXT, LOGITS)
    for _ in range(DRAWS):
        token, probabilities = choice.pick_draft(DRAFT_LOGITS) if drafted == "sampled" else (3, None)
        verified = choice.verify(scores, token, probabilities)
        counts[verified] += 1
        accepted += verified == token
    p = warp(LOGITS).double().softmax(-1)[0]
    assert chi_square(counts, p) < CHI_SQUARE
    # The acceptance of Leviathan et al., corollary 3.6, within five standard deviations of 100,000 draws.
    q = warp(DRAFT_LOGITS).double().softmax(-1)[0] if drafted == "sampled" else torch.eye(6)[3]
    assert abs(accepted / DRAWS - float(torch.minimum(p, q).sum())) < 5 * 0.5 / DRAWS**0.5


def test_statistic_rejects_samples_of_the_draft() -> None:
    p, q = LOGITS.double().softmax(-1)[0], DRAFT_LOGITS.double().softmax(-1)[0]
    counts = torch.multinomial(q, DRAWS, replacement=True, generator=torch.Generator().manual_seed(0)).bincount(minlength=6)
    assert chi_square(counts, p) > 100 * CHI_SQUARE


def test_greedy_choice_takes_the_highest_score() -> None:
    choice = Choice(lambda _, logits: -logits, samples=False)
    scores = choice.process(TEXT, LOGITS)
    assert choice.verify(scores, 0, None) == 4
    assert choice.pick_draft(DRAFT_LOGITS) == (1, None)


def test_equal_distributions_accept_every_token() -> None:
    choice = Choice(lambda _, logits: logits, samples=True, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        token, probabilities = choice.pick_draft(LOGITS)
        assert choice.verify(LOGITS, token, probabilities) == token


def looked_up(text: list[int], count: int) -> list[int]:
    """The proposal by hand: the last earlier occurrence of the longest n-gram, of 4 to 2 tokens."""
    for size in range(min(4, len(text)), 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                found = text[end:]
                return (found * (count // len(found) + 1))[:count]
    return []


def test_prompt_lookup_proposes_what_followed_the_longest_match() -> None:
    choice = Choice(lambda _, logits: logits, samples=False)
    draw = torch.Generator().manual_seed(1)
    for vocabulary in (2, 3, 5, 20):
        text, lookup = torch.randint(0, vocabulary, (5,), generator=draw).tolist(), PromptLookup()
        found = 0
        for count in range(1, 40):
            lookup.observe(text)
            proposed = lookup.propose(count, choice).tokens
            assert list(proposed) == looked_up(text, count)
            found += bool(proposed)
            text += torch.randint(0, vocabulary, (count % 3 + 1,), generator=draw).tolist()
        assert found > 10 or vocabulary == 20
    lookup.start()
    lookup.observe([1, 2])
    assert not lookup.propose(4, choice).tokens


def run(pace: Pace, calls: int, right: float, draft: float, call: float, row: float) -> tuple[list[int], float]:
    """The drafted tokens of each call, and the seconds per token, on a machine with these times.

    Args:
        right: the probability of each drafted token to be right.
        draft: seconds per drafted token.
        call: seconds of a call of one token, and `row` for each further one.
    """
    draw = torch.Generator().manual_seed(0)
    counts, seconds, tokens = list[int](), 0.0, 0
    for _ in range(calls):
        count = pace.count()
        hits = (torch.rand(count, generator=draw) < right).tolist()
        accepted = [*hits, False].index(False)
        counts.append(count)
        pace.observe(count, accepted, count * draft, call + count * row)
        seconds, tokens = seconds + count * draft + call + count * row, tokens + accepted + 1
    return counts, seconds / tokens


def test_first_call_times_one_token_and_the_second_drafts() -> None:
    counts, _ = run(Pace(15), 2, 0.5, 0.1, 1.0, 0.1)
    assert counts == [0, FIRST]


def test_right_and_cheap_drafts_grow_to_the_most() -> None:
    counts, seconds = run(Pace(15), 60, 1.0, 0.01, 1.0, 0.02)
    assert max(counts) == 15 and counts[-10:] == [15] * 10
    assert seconds < 0.15


def test_number_of_drafts_is_near_the_best() -> None:
    """Against the least expected time of all fixed numbers of drafts."""
    right, draft, call, row = 0.7, 0.1, 1.0, 0.05
    best = min((call + k * (draft + row)) * (1 - right) / (1 - right ** (k + 1)) for k in range(16))
    _, seconds = run(Pace(15), 800, right, draft, call, row)
    # The acceptance is estimated from the last ten calls or so, and its noise moves the number of drafts.
    assert seconds < 1.05 * best


@pytest.mark.parametrize(("right", "draft", "row"), [(0.0, 0.0, 0.05), (0.3, 0.6, 0.1), (0.1, 0.1, 0.3)])
def test_drafting_stops_where_it_is_slower(right: float, draft: float, row: float) -> None:
    counts, seconds = run(Pace(15), 600, right, draft, 1.0, row)
    assert sum(count > 0 for count in counts) < 100
    # A trial of four drafts, 2.4 seconds of drafting at most, once in 256 calls at the end, and more often before.
    assert seconds < 1.05


def test_trials_become_rarer_and_drafting_comes_back() -> None:
    pace = Pace(15)
    counts, _ = run(pace, 1500, 0.0, 0.5, 1.0, 0.1)
    trials = [index for index, count in enumerate(counts) if count]
    waits = [after - before for before, after in pairwise(trials)]
    assert waits[0] > SHORTEST_PAUSE and waits == sorted(waits) and waits[-1] <= LONGEST_PAUSE + 2
    counts, _ = run(pace, 400, 1.0, 0.02, 1.0, 0.02)
    assert counts[-1] == 15
    # A new text starts with a trial.
    run(pace, 10, 0.0, 0.5, 1.0, 0.1)
    pace.start()
    assert pace.count() == FIRST


def test_pace_of_proposers_that_find_nothing() -> None:
    pace = Pace(15)
    for _ in range(50):
        pace.observe(0, 0, 0.0, 1.0)
    assert pace.count() == FIRST
    assert Pace(2).count() == 0


def test_counts_of_drafts() -> None:
    assert str(Drafts()) == "drafts: 0 of 0 tokens accepted, 0%; 1 tokens per call"
    drafts = Drafts(proposed=20, accepted=15, calls=10, tokens=25)
    assert (drafts.acceptance, drafts.tokens_per_call) == (0.75, 2.5)
    assert str(drafts) == "drafts: 15 of 20 tokens accepted, 75%; 2.5 tokens per call"
