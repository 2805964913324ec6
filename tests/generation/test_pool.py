"""Tests of lissom.compile_pool: texts of unlike length in one program, each as it is alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import lissom
from lissom.errors import InputError, UnsupportedError
from lissom.generation import batching
from lissom.generation.batching import Text
from lissom.generation.pool import PooledDecoder
from lissom.generation.sampling import Sampling
from tests.support.decoders import VOCABULARY, decoder
from tests.support.neighbours import all_but_slow

LENGTH, NEW = 64, 10
GREEDY = Sampling()
EXACT = "exact"


@cache
def pool(name: str, passes: str = EXACT, **options: Any) -> PooledDecoder:
    sizes = {"max_length": LENGTH, "sequences": 4, "slots": 3 * LENGTH} | options
    return lissom.compile_pool(decoder(name), passes=passes, checks="structural", goal=None, **sizes)


@cache
def alone(name: str, passes: str = EXACT) -> Callable[[tuple[int, ...]], list[int]]:
    """A function from a prompt to the answer of a decoder for one text."""
    one = lissom.compile_generation(decoder(name), max_length=LENGTH, passes=passes, checks="structural", goal=None)

    @cache
    def answer(prompt: tuple[int, ...]) -> list[int]:
        given = torch.tensor([prompt])
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return one.generate(given, max_new_tokens=NEW, **options)[0, len(prompt) :].tolist()

    return answer


def texts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    source = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCABULARY, (length,), generator=source).tolist()) for length in lengths]


@pytest.mark.parametrize(
    "name", all_but_slow(["llama", "gemma3", "mistral", "gpt2", "qwen3", "phi"], "llama", "gpt2", "qwen3", "phi")
)
def test_texts_of_unlike_length_are_answered_as_alone(name: str) -> None:
    prompts = texts(5, 1, 20, 9, 33, 7, 7)
    answers = pool(name).generate(prompts, NEW, GREEDY)
    assert [answer.tolist() for answer in answers] == [alone(name)(prompt) for prompt in prompts]


@pytest.mark.parametrize("passes", ["quantize{scheme=int8-weight}", "quantize-cache", "prune-neurons{keep=0.5}"])
def test_passes_apply_as_to_other_decoders(passes: str) -> None:
    prompts = texts(5, 12, 30)
    found = pool("llama", passes)
    assert [answer.tolist() for answer in found.generate(prompts, NEW, GREEDY)] == [alone("llama", passes)(p) for p in prompts]


def test_calibration_texts_are_read_one_by_one() -> None:
    data = [torch.tensor([text]) for text in texts(20, 30)]
    found = lissom.compile_pool(
        decoder("llama"), max_length=LENGTH, sequences=2, passes="quantize{scheme=int4-weight},gptq", data=data, goal=None
    )
    step = next(step for step in found.report.history.steps if step.spelling == "gptq")
    assert step.rewritten > 0
    assert len(found.generate(texts(5), NEW, GREEDY)[0]) == NEW


def test_a_prompt_in_pieces_does_not_stop_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "PIECE", 8)
    monkeypatch.setattr(batching, "BESIDE", 4)
    found, (short, long) = pool("llama"), texts(4, 30, seed=7)
    lengths, read = list[list[int]](), found.read
    monkeypatch.setattr(found, "read", lambda parts: (lengths.append([len(ids) for _, ids in parts]), read(parts))[1])
    stream, other = found.stream(short, NEW, GREEDY), found.stream(long, NEW, GREEDY)
    first = next(stream)
    late = next(other)
    assert lengths == [[4], *[[1, 4]] * 7, [1, 2]]
    assert found.running == 2
    assert [first, *stream] == alone("llama")(short)
    assert [late, *other] == alone("llama")(long)


def test_a_shared_prompt_is_read_once() -> None:
    found = pool("gemma3", slots=8 * LENGTH)
    (start,) = texts(40, seed=1)
    prompts = [(*start, *rest) for rest in texts(3, 5, 1, seed=2)]
    wanted = [alone("gemma3")(prompt) for prompt in prompts]
    assert found.generate(prompts[:1], NEW, GREEDY)[0].tolist() == wanted[0]
    before = count_tokens(found)
    assert [answer.tolist() for answer in found.generate(prompts[1:], NEW, GREEDY)] == wanted[1:]
    assert count_tokens(found) - before < sum(map(len, prompts[1:])) + 2 * NEW - 2 * 32


def count_tokens(found: PooledDecoder, counts: dict[int, list[int]] = {}) -> int:  # noqa: B006
    """The tokens that a pool has read in calls since the first count."""
    if id(found) not in counts:
        read, counts[id(found)] = found.read, [0]

        def counted(parts: Any) -> torch.Tensor:
            counts[id(found)][0] += sum(len(ids) for _, ids in parts)
            return read(parts)

        found.read = counted  # type: ignore[method-assign]
    return counts[id(found)][0]


def test_threads_share_calls_and_each_gets_its_own_answer() -> None:
    found, prompts = pool("llama"), texts(*range(1, 25), seed=3)
    answers: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        answers[index] = list(found.stream(prompts[index], NEW, GREEDY))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[index] for index in range(len(prompts))] == [alone("llama")(prompt) for prompt in prompts]
    assert (found.waiting, found.running) == (0, 0)


def test_a_text_that_is_left_frees_its_slots() -> None:
    found = pool("llama")
    for prompt in texts(*[30] * 12, seed=4):
        stream = found.stream(prompt, 30, GREEDY)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
    assert found.running == 0
    assert len(found.generate(texts(50), NEW, GREEDY)[0]) == NEW


def test_one_thread_makes_all_calls() -> None:
    found, prompts = pool("llama"), texts(5, 9, 3, 12, 7, 30, seed=8)
    assert not found.step()  # without a text there is no call
    submitted = [found.submit(prompt, NEW, GREEDY) for prompt in prompts]
    calls = 1
    while found.step():
        calls += 1
    assert [list(text.new) for text in submitted] == [alone("llama")(prompt) for prompt in prompts]
    assert all(text.is_finished and text.error is None for text in submitted)
    assert calls < len(prompts) * NEW


def test_a_submitted_text_is_cancelled() -> None:
    found, (first, second, *more) = pool("llama"), texts(5, 9, 4, 4, 4, 4, seed=9)
    submitted = [found.submit(prompt, NEW, GREEDY) for prompt in (first, second, *more)]
    found.step()
    assert found.reserved == 5 * 16  # pages of 16 slots for texts of 15, 19, 14 and 14 tokens
    found.cancel(submitted[0])  # one that runs, and one that waits
    found.cancel(submitted[-1])
    assert found.reserved == 4 * 16  # before the next call
    while found.step():
        pass
    assert (found.waiting, found.running, found.reserved, len(submitted[-1].new)) == (0, 0, 0, 0)
    assert [list(text.new) for text in submitted[1:-1]] == [alone("llama")(prompt) for prompt in (second, *more[:-1])]
    assert len(submitted[0].new) < NEW


def test_a_text_that_is_cancelled_while_its_token_is_chosen_ends() -> None:
    """The cancel of another thread comes between a call and the end of the choice."""
    found, given = pool("llama"), list[Text]()

    def cancel(text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if text.shape[1] == 6:
            found.cancel(given[0])
        return logits

    given.append(found.submit(texts(5)[0], NEW, Sampling(process=cancel)))
    calls = 0
    while found.step():
        calls += 1
    assert (calls, given[0].is_finished, found.running) == (1, True, 0)


def test_what_a_processor_raises_ends_its_text_alone() -> None:
    def fails(text: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if text.shape[1] > 6:
            raise ArithmeticError("no more")
        return logits

    found = pool("llama")
    (first, second) = texts(5, 5, seed=5)
    stream, other = found.stream(first, NEW, Sampling(process=fails)), found.stream(second, NEW, GREEDY)
    assert next(other) == alone("llama")(second)[0]
    with pytest.raises(ArithmeticError, match="no more"):
        list(stream)
    assert list(other) == alone("llama")(second)[1:]


def test_texts_end_at_stop_tokens_and_sample_by_seed() -> None:
    found, (prompt,) = pool("llama"), texts(6, seed=6)
    wanted = alone("llama")(prompt)
    stop = wanted[3]
    (answer,) = found.generate([prompt], NEW, Sampling(stop={stop}))
    assert answer.tolist() == wanted[: wanted.index(stop)]
    warm = [found.generate([prompt], NEW, Sampling(temperature=2.0, seed=seed))[0].tolist() for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    narrow = found.generate([prompt], NEW, Sampling(temperature=2.0, top_k=1))[0].tolist()
    assert narrow == found.generate([prompt], NEW, Sampling(temperature=2.0, top_p=1e-6))[0].tolist() == wanted


@pytest.mark.parametrize(
    ("prompt", "new", "sentence"),
    [
        ([], 3, "one or more"),
        ([1.5], 3, "give whole numbers"),
        ([[1], [2]], 3, "give whole numbers"),
        ([VOCABULARY], 3, "use the model's tokenizer"),
        ([-1], 3, "use the model's tokenizer"),
        ([1, 2], LENGTH, "lower max_new_tokens"),
        ([1, 2], 0, "give 1 or more"),
    ],
)
def test_texts_that_do_not_fit_are_refused(prompt: Any, new: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        pool("llama").stream(prompt, new)


def test_sampling_out_of_range_is_refused() -> None:
    for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"seed": 1 << 64}):
        with pytest.raises(InputError):
            Sampling(**options)


@pytest.mark.parametrize(
    ("name", "options", "error", "sentence"),
    [
        ("mamba", {}, UnsupportedError, "keep a recurrent state; use batch="),
        ("llama", {"slots": 8}, InputError, "one text of max_length=64 takes 64; give that many or more"),
        ("llama", {"sequences": 0}, InputError, "1 or more"),
        ("llama", {"backend": lissom.Distributed(world_size=2)}, UnsupportedError, "one process"),
    ],
)
def test_what_has_no_pool_is_refused(name: str, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        lissom.compile_pool(decoder(name), **{"max_length": LENGTH, "sequences": 2, **options})
