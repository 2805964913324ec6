"""`python -m tools.zoo.generation`: compare the greedy tokens of compiled decoders with those of transformers' `generate`.

Every model of the zoo that generates is compiled with its KV cache for two rows, one of which has padding. A model that
transformers itself cannot run with a cache does not apply.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import VisionEncoderDecoderConfig, VisionEncoderDecoderModel

import lissom
from lissom.errors import LissomError
from lissom.frontends.generation.encoder_decoder import encoder_example
from tests.support.models import Case
from tools.zoo import huggingface, selection
from tools.zoo.check import sentence
from tools.zoo.entry import FAMILIES, Entry
from tools.zoo.weights import woken

MAX_LENGTH, NEW_TOKENS, BATCH = 24, 8, 2
GREEDY: Mapping[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
_PADDING = 4
_LARGER = 3.0  # times the weights of the zoo, so that attention is not even and the tokens of an answer differ
_START = 1
_CACHELESS = "without a KV cache"
Record = dict[str, Any]
_SECTION = "## Generation\n"
_INTRODUCTION = """\
Models that generate, compiled by `lissom.compile_generation` for two rows, one of them with padding. Their greedy tokens are
compared with those of transformers' `generate`; `python -m tools.zoo.generation` does it. A model that transformers itself
cannot run with a cache is listed and not counted. The last list has models that are compiled without a cache.
"""
EQUAL, REFUSED, DIFFERS, FAILS, ELSEWHERE = "equal", "refused", "differs", "fails", "not in transformers"
NONE = "does not generate"
GENERATING: Mapping[str, tuple[str, ...]] = {
    "causal": huggingface.MAPPINGS["causal"],
    "encoder-decoder": huggingface.MAPPINGS["encoder-decoder"],
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",),
}
"""The families, and the tables of transformers whose models generate."""
_WITH_PICTURES = ("pix2struct", "pp_formulanet", "vision-encoder-decoder")
"""Types with an encoder of pictures, in the table of models that read pictures and text."""
_PAIRS = {"vision/donut": ("donut-swin", "mbart"), "vision/trocr": ("vit", "trocr")}
"""Models that transformers makes of two others: the types of the encoder and the decoder."""


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Build the model, and compare the tokens it generates with those of the compiled one.

    report: called with the record after every phase.
    """
    record: Record = {"phase": "build", "outcome": FAILS, "reason": None}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", message=f"compiled {_CACHELESS}")
        try:
            _check(entry, record, report)
        except LissomError as error:
            record |= {"outcome": REFUSED, "reason": sentence(error)}
        except Exception as error:
            outcome = ELSEWHERE if record["phase"] == "transformers" else FAILS
            record |= {"outcome": outcome, "reason": f"{record['phase']}: {sentence(error)}"}
    report(record | {"phase": None, "cacheless": [str(warning.message).partition(": ")[2] for warning in caught]})


def _check(entry: Entry, record: Record, report: Callable[[Record], None]) -> None:
    def phase(name: str) -> None:
        record["phase"] = name
        report(record)

    prepared = generating(entry)
    if prepared is None:
        record |= {"outcome": NONE}
        return
    model, inputs = prepared
    phase("transformers")
    wanted = model.generate(**inputs, **GREEDY, use_cache=True)
    phase("compile")
    fast: Any = lissom.compile_generation(model, max_length=MAX_LENGTH, batch=BATCH, goal=None, checks="off")
    phase("generate")
    tokens = fast.generate(**inputs, **GREEDY)
    record["different_tokens"] = len(wanted.unique())
    phase("transformers")
    record["outcome"], record["reason"] = compared(model, inputs, wanted, tokens)


def compared(model: Any, inputs: Mapping[str, Any], wanted: torch.Tensor, tokens: torch.Tensor) -> tuple[str, str | None]:
    """The outcome for the tokens that transformers gives with a cache and those that were found, and its reason."""
    if wanted.shape == tokens.shape and torch.equal(wanted, tokens):
        return EQUAL, None
    if not torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), wanted):
        return ELSEWHERE, "it gives other tokens with a cache than without one"
    return DIFFERS, f"{tokens.tolist()} instead of {wanted.tolist()}"


def generating(entry: Entry) -> tuple[Any, dict[str, Any]] | None:
    """The model of an entry and the arguments of its `generate`: for decoders the zoo's, padded on the left, for others those
    that are made from the configuration.

    None if it does not generate.
    """
    case = entry.build()
    model: Any = case.model
    if not (callable(getattr(model, "can_generate", None)) and model.can_generate()):
        return None
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(_LARGER)
    given: dict[str, Any] = case.kwargs
    inputs = {name: value for name, value in given.items() if not name.startswith("decoder_") and name != "use_cache"}
    if model.config.is_encoder_decoder:
        inputs = dict(encoder_example(model, None))
        if model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = _START
    elif "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return model, inputs


def entries() -> Iterator[Entry]:
    """The models of the zoo that may generate, and encoder-decoders that read pictures."""
    yield from huggingface.entries(mappings=GENERATING)
    for entry in huggingface.entries(mappings={"vision": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",)}):
        if entry.name.removeprefix("vision/") in _WITH_PICTURES:
            yield entry
    for name, parts in _PAIRS.items():
        yield Entry(name, "vision", partial(_pair, *parts))


def _pair(encoder: str, decoder: str) -> Case:
    """A pair of an encoder of pictures and a decoder."""
    parts = huggingface.config_of("vision", encoder), huggingface.config_of("causal", decoder)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    return Case(woken(lambda: VisionEncoderDecoderModel(config)), {})


def describe(record: Record) -> str:
    """One line: the model, its time, and its result."""
    reason = f": {record['reason']}" if record.get("reason") else ""
    return f"{record['name']} ({record['total_seconds']:.1f} s): {record['outcome']}{reason}"


def headline(records: Sequence[Record]) -> str:
    """The sentence that counts the models with equal tokens."""
    run = [record for record in records if record["outcome"] not in (NONE, ELSEWHERE)]
    equal = sum(record["outcome"] == EQUAL for record in run)
    return f"Of {len(run)} models that transformers generates with, {equal} ({equal / max(1, len(run)):.1%}) give equal tokens."


def section(records: Sequence[Record]) -> str:
    """The section of the coverage page: a row per family, then the models without equal tokens, with the reasons."""
    told = [record for record in records if record["outcome"] != NONE]
    lines = [
        _SECTION,
        _INTRODUCTION,
        f"{headline(told)}\n",
        "| family | models | equal | refused | wrong |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        counts = Counter(record["outcome"] for record in told if record["family"] == family)
        if counts:
            wrong = counts[DIFFERS] + counts[FAILS]
            lines.append(f"| {family} | {counts.total() - counts[ELSEWHERE]} | {counts[EQUAL]} | {counts[REFUSED]} | {wrong} |")
    others = sorted((record for record in told if record["outcome"] != EQUAL), key=lambda record: record["name"])
    lines += ["", *(f"- {record['name']}: {record['outcome']}, {record['reason']}" for record in others)]
    slow = sorted(f"- {record['name']}: {line}" for record in told for line in record.get("cacheless", ()))
    lines += ["", f"Compiled {_CACHELESS}, so that every token costs a forward over the whole text:\n", *slow]
    return "\n".join(lines).rstrip("\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the models that the arguments select; returns 1 if one gives other tokens, or fails."""
    is_wrong = lambda record: record["outcome"] in (DIFFERS, FAILS)  # noqa: E731
    return selection.compare_all(
        arguments, "generation", __doc__, list(entries()), check, describe, section, headline, is_wrong
    )


if __name__ == "__main__":
    sys.exit(main())
