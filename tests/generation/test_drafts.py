"""Tests of decoders with a draft: their texts are those without one, with every kind of draft."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import lissom
from lissom.errors import ArtifactError
from lissom.generation.choice import Choice
from lissom.generation.configured import ConfiguredDecoder
from lissom.generation.directory import DRAFT, PROPOSER
from lissom.generation.model import GenerationModel
from lissom.generation.pace import Pace
from lissom.generation.proposers import DraftDecoder, PromptLookup, Proposal
from lissom.generation.speculate import VERIFIED
from lissom.generation.stream import stream_tokens
from tests.support.decoders import MAX_LENGTH, VOCABULARY, decoder, prompt
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")
GREEDY = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
HALF = "prune-layers{keep=0.5,criterion=magnitude}"
NAMES = ["llama", "gemma3", "mistral", "gpt2", "bloom", "openai_gpt"]


class Always(Pace):
    """Drafts the same number of tokens for every call, so that tests depend on no time."""

    drafted = 5

    def count(self) -> int:
        return self.drafted

    def observe(self, drafted: int, accepted: int, draft_seconds: float, call_seconds: float) -> None:
        assert 0 <= accepted <= drafted <= self.drafted and call_seconds > 0


class Shuffled:
    """Proposes tokens at random, after up to four right ones of a text that is known."""

    def __init__(self, right: Sequence[int] = ()) -> None:
        self.right = list(right)
        self.draw = torch.Generator().manual_seed(0)
        self.length = 0

    def start(self) -> None:
        self.length = 0

    def observe(self, text: Sequence[int]) -> None:
        self.length = len(text)

    def propose(self, count: int, choice: Choice) -> Proposal:
        tokens = torch.randint(0, VOCABULARY, (count,), generator=self.draw).tolist()
        kept = int(torch.randint(0, 5, (), generator=self.draw))
        known = self.right[self.length : self.length + min(kept, count)]
        return Proposal([*known, *tokens[len(known) :]])


def compile(name: str = "llama", *, drafted: int = 5, **options: object) -> GenerationModel:
    """A decoder that drafts so many tokens for every call."""
    fast = lissom.compile_generation(decoder(name), **{"max_length": MAX_LENGTH, "goal": None, **options})
    if fast.speculator is not None:
        fast.speculator.pace = Always(min(fast.last_logits, VERIFIED) - 1)
        fast.speculator.pace.drafted = drafted
    return fast


@cache
def compiled(name: str = "llama", draft: str | None = "prompt-lookup", passes: str = "exact") -> GenerationModel:
    with pytest.warns(UserWarning, match="without a KV cache") if name == "openai_gpt" else nullcontext():
        return compile(name, draft=draft, passes=passes)


@pytest.mark.parametrize("draft", ["prompt-lookup", HALF, "quantize{scheme=int8-weight}"])
@pytest.mark.parametrize("name", all_but_slow(NAMES, "llama", "gemma3", "gpt2"))
def test_greedy_text_is_that_of_the_model(name: str, draft: str) -> None:
    fast, model = compiled(name, draft), decoder(name)
    accepted = 0
    for length in (1, 2, 5, 9, 17, 22):
        inputs = prompt(length=length)
        wanted = model.generate(**inputs, **GREEDY)
        assert torch.equal(fast.generate(**inputs, **GREEDY), wanted)
        drafts = fast.drafts
        assert drafts is not None and drafts.tokens == 39 and drafts.calls == 39 - drafts.accepted
        # The cache holds the text without its last token.
        assert fast.length == wanted.shape[1] - 1
        accepted += drafts.accepted
    assert accepted > 0


@pytest.mark.parametrize("name", all_but_slow(NAMES, "llama", "gemma3"))
def test_rejected_tokens_leave_nothing_behind(name: str) -> None:
    """Tokens that are mostly wrong; windows of 8 tokens are cropped by up to 15."""
    fast, model = compiled(name), decoder(name)
    speculator = fast.speculator
    assert speculator is not None
    kept = speculator.proposer, speculator.pace
    inputs = prompt(length=11)
    wanted = model.generate(**inputs, **GREEDY)
    try:
        for drafted, right in ((3, ()), (15, ()), (7, wanted[0].tolist())):
            speculator.proposer, speculator.pace = Shuffled(right), Always(15)
            speculator.pace.drafted = drafted
            assert torch.equal(fast.generate(**inputs, **GREEDY), wanted)
        assert speculator.drafts.accepted > 5
    finally:
        speculator.proposer, speculator.pace = kept


def drafted(passes: str, draft: str) -> GenerationModel:
    """A decoder with these passes and a draft that is smaller."""
    if draft == HALF:
        return compile(passes=passes, draft=compiled("llama", None, f"{HALF},quantize{{scheme=int8-weight,embeddings=true}}"))
    return compiled("llama", draft, passes)


@pytest.mark.parametrize("passes", ["quantize{scheme=int8-weight}", "quantize{scheme=int4-weight},quantize-cache"])
@pytest.mark.parametrize("draft", ["prompt-lookup", HALF])
def test_greedy_text_with_quantized_weights_is_that_without_a_draft(passes: str, draft: str) -> None:
    fast, plain = drafted(passes, draft), compiled("llama", None, passes)
    for length in (2, 6, 13):
        assert torch.equal(fast.generate(**prompt(length=length), **GREEDY), plain.generate(**prompt(length=length), **GREEDY))


def logits_in_calls(fast: GenerationModel, text: torch.Tensor, tokens: int) -> torch.Tensor:
    """The logits of every token of a text, [tokens, vocabulary], read so many tokens per call."""
    fast.reset()
    return torch.cat([fast.step_all(part)[0] for part in text.split(tokens, 1)]).float()


@pytest.mark.parametrize("passes", ["quantize{scheme=int8-dynamic}", "balanced", "cast"])
@pytest.mark.parametrize("draft", ["prompt-lookup", HALF])
def test_greedy_tokens_with_rounded_activations_are_the_likeliest_up_to_rounding(passes: str, draft: str) -> None:
    """Against logits of one token per call, which other kernels compute: last bits move activations to a neighbouring level."""
    fast, plain = drafted(passes, draft), compiled("llama", None, passes)
    for length in (2, 6, 13):
        text = fast.generate(**prompt(length=length), **GREEDY)
        single = logits_in_calls(plain, text[:, :-1], 1)
        several = [logits_in_calls(fast, text[:, :-1], size) for size in (2, 6, 16)]
        chosen = single.gather(1, text[0, 1:, None])[:, 0]
        # The errors of the chosen and of the largest logit, measured on the same text, and the last bit of bfloat16.
        error = max(float((single - each).abs().max()) for each in several)
        rounding = 2 * error + 2**-7 * float(single.abs().max())
        assert float((single.max(1).values - chosen)[length - 1 :].max()) <= rounding
        assert rounding < 0.2 * float(single.abs().max())


def test_onnxruntime_verifies_drafts() -> None:
    pytest.importorskip("onnxruntime")
    fast = compile(backend=lissom.OnnxRuntime(timing_seconds=0), draft="prompt-lookup")
    wanted = decoder("llama").generate(**prompt(), **GREEDY)
    assert torch.equal(fast.generate(**prompt(), **GREEDY), wanted)
    assert fast.drafts is not None and fast.drafts.proposed > 0


def test_draft_is_another_model() -> None:
    fast = compile("gpt2", draft=decoder("llama"))
    assert isinstance(fast.speculator.proposer, DraftDecoder)
    assert torch.equal(fast.generate(**prompt(), **GREEDY), decoder("gpt2").generate(**prompt(), **GREEDY))
    assert fast.drafts.proposed > 0


def test_draft_calibrates_on_the_same_data() -> None:
    """Given as an iterator, which is read once."""
    texts = (prompt(length=length)["input_ids"] for length in (9, 12))
    fast = compile(draft="prune-layers{keep=0.5}", data=texts)
    fast.generate(**prompt(), **GREEDY)
    assert fast.drafts is not None and fast.drafts.proposed > 0


def test_pace_measured_in_the_run_gives_the_same_text() -> None:
    fast = compiled()
    speculator = fast.speculator
    kept, speculator.pace = speculator.pace, Pace(15)
    try:
        for length in (3, 8):
            wanted = decoder("llama").generate(**prompt(length=length), **GREEDY)
            assert torch.equal(fast.generate(**prompt(length=length), **GREEDY), wanted)
    finally:
        speculator.pace = kept


def test_a_long_prompt_has_logits_of_its_last_tokens_alone() -> None:
    fast = compiled()
    assert (fast.last_logits, fast.all_logits) == (VERIFIED, False)
    ids = prompt(length=30)["input_ids"]
    fast.reset()
    rows = fast.step_all(ids)
    with torch.no_grad():
        wanted = decoder("llama")(ids).logits
    # Sums in another order over two layers, in float32.
    torch.testing.assert_close(rows, wanted[:, -VERIFIED:], rtol=0, atol=3e-5)
    fast.reset()
    assert fast.step(ids).shape == (1, VOCABULARY)
    fast.crop(3)
    assert fast.step_all(ids[:, 3:8]).shape == (1, 5, VOCABULARY)
    assert compile(max_length=8, draft="prompt-lookup").last_logits == 4


@pytest.mark.parametrize("draft", ["prompt-lookup", HALF])
def test_padding_of_the_prompt_is_not_read(draft: str) -> None:
    fast, inputs = compiled("llama", draft), prompt(length=12, padding=4)
    assert torch.equal(fast.generate(**inputs, **GREEDY), decoder("llama").generate(**inputs, **GREEDY))
    assert fast.drafts.accepted > 0


def test_text_stops_inside_an_accepted_draft() -> None:
    """At every place, by a token, a criterion and a number of tokens; and the text goes on from there."""
    fast, model = compiled("gpt2", "quantize{scheme=int8-weight}"), decoder("gpt2")
    wanted = model.generate(**prompt(), **GREEDY)

    class At(StoppingCriteria):
        def __init__(self, length: int) -> None:
            self.length = length

        def __call__(self, input_ids, scores, **_):
            return torch.full((1,), input_ids.shape[1] >= self.length)

    for length in range(8, 22):
        found = fast.generate(**prompt(), **GREEDY, stopping_criteria=StoppingCriteriaList([At(length)]))
        assert torch.equal(found, wanted[:, :length]) and fast.length == length - 1
        longer = fast.generate(found, cache=fast.cache, **{**GREEDY, "max_new_tokens": 5})
        assert torch.equal(longer, wanted[:, : length + 5])
        assert torch.equal(fast.generate(**prompt(), **{**GREEDY, "max_new_tokens": length - 7}), found)
    end = int(wanted[0, 15])
    found = fast.generate(**prompt(), **{**GREEDY, "eos_token_id": end})
    assert torch.equal(found, model.generate(**prompt(), **{**GREEDY, "eos_token_id": end})) and int(found[0, -1]) == end


def test_streamers_and_processors_see_one_token_after_another() -> None:
    fast = compiled()

    class Pieces:
        def put(self, value: torch.Tensor) -> None:
            pieces.append(value.tolist())

        def end(self) -> None:
            pieces.append("end")

    def banned(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return scores.index_fill(1, ids[0, -3:], -torch.inf)

    options = {**GREEDY, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    runs = []
    for each in (decoder("llama"), fast):
        pieces, seen = list[object](), list[list[int]]()
        output = each.generate(**prompt(), **options, streamer=Pieces(), logits_processor=[banned], repetition_penalty=1.3)
        runs.append((output, pieces, seen))
    (wanted, *rest), (found, *same) = runs
    assert torch.equal(found.sequences, wanted.sequences) and same == rest
    # Sums in another order over two layers, in float32.
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=3e-5)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=6e-5)
    assert found.cache is fast.cache


def test_samples_with_prompt_lookup_are_those_without_a_draft() -> None:
    """One draw for each token, which is compared with the proposed one."""
    options = {**GREEDY, "do_sample": True, "temperature": 0.4, "top_p": 0.95, "top_k": 20}
    texts = []
    for draft in (None, "prompt-lookup"):
        torch.manual_seed(4)
        texts.append(compiled("llama", draft).generate(**prompt(), **options))
    assert torch.equal(*texts)
    assert compiled().drafts.proposed > 0


@pytest.mark.slow
def test_sampled_texts_have_the_distribution_of_the_model() -> None:
    """Pairs of tokens of 6,000 texts, drafted by another model, at a low temperature and cut to the four likeliest."""
    fast, model = compiled("llama", HALF), decoder("llama")
    ids = prompt(length=3)["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": True, "temperature": 2.0, "top_k": 4, "eos_token_id": None, "pad_token_id": 0}

    def probabilities(text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(text).logits[0, -1] / 2.0
        return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf).double().softmax(-1)

    expected: dict[tuple[int, ...], float] = {}
    first = probabilities(ids)
    for one in first.nonzero().flatten().tolist():
        second = probabilities(torch.cat([ids, torch.tensor([[one]])], 1))
        for two in second.nonzero().flatten().tolist():
            expected[one, two] = float(first[one] * second[two])
    counts, texts = dict.fromkeys(expected, 0), 6000
    torch.manual_seed(1)
    for _ in range(texts):
        found = fast.generate(ids, attention_mask=torch.ones_like(ids), **options)
        counts[tuple(found[0, 3:5].tolist())] += 1
    statistic = sum((counts[pair] - texts * p) ** 2 / (texts * p) for pair, p in expected.items())
    assert fast.drafts.proposed > 0
    # A right sampler is above it once in a million seeds, for 15 degrees of freedom.
    assert len(expected) == 16 and statistic < 56.5


@pytest.mark.parametrize("draft", ["prompt-lookup", HALF])
def test_streamed_tokens(draft: str) -> None:
    fast, ids = compiled("llama", draft), prompt()["input_ids"]
    wanted = decoder("llama").generate(**prompt(), **GREEDY)[0, 7:].tolist()
    assert list(stream_tokens(fast, ids, max_new_tokens=40)) == wanted
    assert fast.drafts.accepted > 0
    end = wanted[20]
    assert list(stream_tokens(fast, ids, max_new_tokens=40, stop=[end])) == wanted[: wanted.index(end)]
    tokens = stream_tokens(fast, ids, max_new_tokens=40)
    assert [next(tokens) for _ in range(9)] == wanted[:9]
    tokens.close()
    assert fast.length == 7 + 8
    # Sampled tokens of one seed, drafted and not.
    plain = list(stream_tokens(compiled("llama", None), ids, max_new_tokens=20, temperature=0.5, seed=3))
    if draft == "prompt-lookup":
        assert list(stream_tokens(fast, ids, max_new_tokens=20, temperature=0.5, seed=3)) == plain


@pytest.mark.parametrize("draft", ["prompt-lookup", HALF])
def test_it_is_saved_with_its_draft(draft: str, tmp_path: Path) -> None:
    fast, wanted = compiled("llama", draft), decoder("llama").generate(**prompt(), **GREEDY)
    fast.save(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names & {DRAFT, PROPOSER} == {PROPOSER if draft == "prompt-lookup" else DRAFT}
    kind = PromptLookup if draft == "prompt-lookup" else DraftDecoder
    copies = (lissom.load_generation(tmp_path / "saved"), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)))
    for again in copies:
        assert again.speculator is not None and type(again.speculator.proposer) is kind
        again.speculator.pace = Always(15)
        assert torch.equal(again.generate(**prompt(), **GREEDY), wanted)
        assert again.drafts.proposed > 0
        assert again.generate(**prompt(), **GREEDY).shape == wanted.shape


def test_saved_decoders_are_loaded_with_another_draft(tmp_path: Path) -> None:
    compiled("llama", "prompt-lookup").save(tmp_path / "saved")
    small = compiled("llama", None, f"{HALF},quantize{{scheme=int4-weight}}")
    small.save(tmp_path / "small")
    for draft in ("prompt-lookup", small, str(tmp_path / "small")):
        again = lissom.load_generation(tmp_path / "saved", draft=draft)
        assert isinstance(again.speculator.proposer, PromptLookup if draft == "prompt-lookup" else DraftDecoder)
        assert torch.equal(again.generate(**prompt(), **GREEDY), decoder("llama").generate(**prompt(), **GREEDY))
    whole = lissom.compile_generation(decoder("llama"), max_length=MAX_LENGTH, all_logits=True, draft=str(tmp_path / "small"))
    assert whole.all_logits and whole.speculator.pace.most == VERIFIED - 1
    (tmp_path / "saved" / PROPOSER).write_text('{"draft": "other"}')
    with pytest.raises(ArtifactError, match=PROPOSER):
        lissom.load_generation(tmp_path / "saved")


def test_a_decoder_without_draft_counts_nothing() -> None:
    assert compiled("llama", None).drafts is None
    assert isinstance(compiled("llama", None), ConfiguredDecoder)
