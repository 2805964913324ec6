"""`lissom.tune_generation`: the best decoder under a bound, found by measuring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from lissom.compiler.pipeline.options import Metric
from lissom.compiler.training.vocabulary import IGNORED
from lissom.driver.compile import optimize_model
from lissom.driver.keywords import keywords_of
from lissom.driver.options import Inputs, Settings, check_data
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.generation.decoder import INPUTS, capture_decoder, check_capacity
from lissom.frontends.models.adapters import with_merged_adapters
from lissom.generation.compile import compile_generation, named_prompts
from lissom.generation.scoring import NextToken, Scorer
from lissom.runtime.compiled_model import CompiledModel, own_state
from lissom.runtime.hosted_model import check_uncompiled
from lissom.tuning.build import silent
from lissom.tuning.request import SearchSettings, check_request
from lissom.tuning.spelling import EXACT
from lissom.tuning.tuned import Tuned, search, searching

if TYPE_CHECKING:
    from lissom.generation.model import GenerationModel

DECODER_GOALS = ("decode", "prefill", "memory")
PERPLEXITY = "perplexity"
_LEAST_BATCHES = _LEAST_TOKENS = 2
_MOST_CALIBRATING = 4096
"""Tokens that calibrate passes where nothing is trained: more make GPTQ slower and hardly better, and judge more closely."""


@dataclass(frozen=True, kw_only=True)
class TuneGenerationSettings(SearchSettings):
    """The keywords of `lissom.tune_generation`."""

    max_length: int
    data: Iterable[torch.Tensor | Mapping[str, object]]
    batch: int = 1
    metric: Literal["perplexity"] | Callable[[NextToken], float] | None = PERPLEXITY
    goal: Literal["decode", "prefill", "memory"] = "decode"
    minutes: float = 40


@keywords_of(TuneGenerationSettings)
def tune_generation(model: nn.Module, settings: TuneGenerationSettings) -> Tuned[GenerationModel]:
    """Search the best decoder under a bound, and compile it with its KV cache.

    The options not listed are those of `compile_generation` and of `lissom.tune`.

    Args:
        data: token ids [rows, tokens], or outputs of a tokenizer: every second group of `batch` rows calibrates passes and
            trains finalists, with distill=False those with the first 4,096 tokens; the others are judged. The bound holds for
            texts that were judged: on others the drop is larger by about its noise, so a tight bound needs more texts.
        metric: `perplexity` bounds its relative increase on the judged texts: with max_drop=0.02 it may grow by 2 %. A function
            is scored as in `compile_generation`; None bounds the relative error of the logits of all tokens.
        goal: what is to become small: `decode`, the time of a token after half of max_length; `prefill`, the time of reading
            the first text of data; `memory`, the bytes of the weights.

    Raises:
        LissomError: as `compile_generation` and `tune`.
        InputError: for fewer than two batches of data.

    Examples:
        >>> import torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> texts = [torch.randint(0, 50, (1, 12)) for _ in range(4)]
        >>> tuned = lissom.tune_generation(LlamaForCausalLM(config), max_length=16, data=texts, minutes=0.1, distill=False)
        >>> tuned.best.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 7])
    """
    max_length, batch, metric, goal = settings.max_length, settings.batch, settings.metric, settings.goal
    if goal not in DECODER_GOALS:
        raise UnsupportedError(f"goal={goal!r:.80} is not known; choose {', '.join(DECODER_GOALS)}")
    if isinstance(metric, str) and metric != PERPLEXITY:
        raise UnsupportedError(f"metric={metric!r:.80} is not known; give '{PERPLEXITY}', a function, or None")
    check_uncompiled(model)
    check_capacity(max_length, batch)
    model = with_merged_adapters(model)
    check_data(settings.data)
    # Without labels, which a search does not read, and without rows that stand in two groups.
    whole = named_prompts(settings.data, batch, max_length, fill=False)
    texts: list[Inputs] = [{name: text[name] for name in INPUTS} for text in whole if isinstance(text, Mapping)]
    if len(texts) < _LEAST_BATCHES:
        raise InputError(
            f"data= holds {len(texts)} batch of {batch} rows; give two or more: one to calibrate passes on, and one to judge"
        )
    judged, calibrating = divided(texts, most=math.inf if settings.distill else _MOST_CALIBRATING)
    score = _metric(metric, judged, batch, max_length)
    request = check_request(calibrating, score, "memory" if goal == "memory" else "latency", settings)
    example = _a_token(judged[0], max_length) if goal == "decode" else judged[0]
    with searching(request) as clock:
        captured = capture_decoder(model, max_length=max_length, batch=batch, all_logits=True, device=None)
        program, *_ = optimize_model(captured.program, example, Settings(passes=EXACT, progress=silent))
        tuned = search(program, example, request, settings.store, clock)
    calibration = tuple(token_ids(calibrating))
    decoder = compile_generation(
        model,
        max_length=max_length,
        batch=batch,
        passes=tuned.pipeline,
        backend=request.backends[tuned.backend],
        data=calibration,
        goal=None,
        progress=silent,
    )
    return Tuned(decoder, tuned.pipeline, tuned.backend, tuned.frontier, tuned.report, calibration)


def divided(texts: Sequence[Inputs], most: float) -> tuple[list[Inputs], list[Inputs]]:
    """The texts that are judged, and those that calibrate: every second one, until those have `most` tokens."""
    judged, calibrating, tokens = list[Inputs](), list[Inputs](), 0
    for place, text in enumerate(texts):
        if place % 2 and tokens < most:
            calibrating.append(text)
            tokens += _ids_and_mask(text)[0].numel()
        else:
            judged.append(text)
    return judged, calibrating


def _metric(
    metric: str | Callable[[NextToken], float] | None, judged: Sequence[Inputs], batch: int, max_length: int
) -> Metric | None:
    """The metric of a search: the texts' perplexity, the caller's, or None."""
    if isinstance(metric, str):
        return perplexity_of_prompts(judged)
    return None if metric is None else Scorer(metric, batch, max_length)


def token_ids(texts: Sequence[Inputs]) -> list[dict[str, torch.Tensor]]:
    """Inputs of a decoder's program as `compile_generation` takes texts."""
    return [{"input_ids": ids, "attention_mask": mask[:, : ids.shape[1]]} for ids, mask in map(_ids_and_mask, texts)]


def _ids_and_mask(text: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(text, Mapping)
    ids, mask = text[INPUTS[0]], text[INPUTS[1]]
    assert isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor)
    return ids, mask


def _a_token(text: Inputs, max_length: int) -> Inputs:
    """The inputs of a call with one token, after half of the cache."""
    ids, mask = _ids_and_mask(text)
    start = torch.full((1,), max_length // 2, device=ids.device)
    return dict(zip(INPUTS, (ids[:, -1:], torch.ones_like(mask), start.expand(len(ids), 1), start), strict=True))


def perplexity_of_prompts(judged: Sequence[Inputs]) -> Metric:
    """The mean log-likelihood of the tokens of texts but the first of each: a drop of 0.02 is a perplexity 2 % higher.

    Raises:
        InputError: if no text has a second token.
    """
    if all(int(mask.sum(1).max()) - (mask.shape[1] - ids.shape[1]) < _LEAST_TOKENS for ids, mask in map(_ids_and_mask, judged)):
        raise InputError("data= has texts of one token, of which none can be predicted; give longer texts")

    def perplexity(model: CompiledModel) -> float:
        total, count = 0.0, 0
        for text in judged:
            ids, mask = _ids_and_mask(text)
            assert isinstance(text, Mapping)
            with own_state(model):
                (logits,) = model.run([tensor for name in INPUTS if isinstance(tensor := text[name], torch.Tensor)])
            assert isinstance(logits, torch.Tensor)
            real = mask[:, : ids.shape[1]].bool()
            wanted = ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), IGNORED)
            # Rows of logits: cross_entropy over another dimension than the last takes five times as long.
            total -= float(
                torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="sum")
            )
            count += int((wanted != IGNORED).sum())
        return total / max(count, 1)

    return perplexity
