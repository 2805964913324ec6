"""`python -m tools.zoo.generation`: compare the greedy tokens of compiled decoders with those of transformers' `generate`.

Every model of the zoo that generates is compiled with its KV cache for two rows, one of which has padding. A model that
transformers itself cannot run with a cache does not apply.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import lissom
from lissom.errors import LissomError
from lissom.frontends.encoder_decoder import encoder_example
from tools.zoo import coverage, huggingface, selection
from tools.zoo.check import sentence
from tools.zoo.entry import FAMILIES, Entry
from tools.zoo.runner import run

MAX_LENGTH, NEW_TOKENS, BATCH = 24, 8, 2
GREEDY: Mapping[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
_PADDING = 4
_LARGER = 3.0  # times the weights of the zoo, so that attention is not even and the tokens of an answer differ
_START = 1
Record = dict[str, Any]
EQUAL, REFUSED, DIFFERS, FAILS, ELSEWHERE = "equal", "refused", "differs", "fails", "not in transformers"
NONE = "does not generate"
GENERATING: Mapping[str, tuple[str, ...]] = {
    "causal": huggingface.MAPPINGS["causal"],
    "encoder-decoder": huggingface.MAPPINGS["encoder-decoder"],
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",),
}
"""The families, and the tables of transformers whose models generate."""


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Build the model, and compare the tokens it generates with those of the compiled one.

    report: called with the record after every phase.
    """
    record: Record = {"phase": "build", "outcome": FAILS, "reason": None}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            _check(entry, record, report)
        except LissomError as error:
            record |= {"outcome": REFUSED, "reason": sentence(error)}
        except Exception as error:
            outcome = ELSEWHERE if record["phase"] == "transformers" else FAILS
            record |= {"outcome": outcome, "reason": f"{record['phase']}: {sentence(error)}"}
    report(record | {"phase": None})


def _check(entry: Entry, record: Record, report: Callable[[Record], None]) -> None:
    def phase(name: str) -> None:
        record["phase"] = name
        report(record)

    phase("build")
    found = generating(entry)
    if found is None:
        record |= {"outcome": NONE}
        return
    model, inputs = found
    phase("transformers")
    wanted = model.generate(**inputs, **GREEDY, use_cache=True)
    phase("compile")
    fast = lissom.compile_generation(model, max_length=MAX_LENGTH, batch=BATCH, goal=None, checks="off")
    phase("generate")
    found = fast.generate(**inputs, **GREEDY)
    record["different_tokens"] = len(wanted.unique())
    record["outcome"] = EQUAL if wanted.shape == found.shape and torch.equal(wanted, found) else DIFFERS
    if record["outcome"] is DIFFERS:
        record["reason"] = f"{found.tolist()} instead of {wanted.tolist()}"
        phase("transformers")
        plain = model.generate(**inputs, **GREEDY, use_cache=False)
        if not torch.equal(plain, wanted):
            record |= {"outcome": ELSEWHERE, "reason": "it gives other tokens with a cache than without one"}


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
    inputs = {name: value for name, value in case.kwargs.items() if not name.startswith("decoder_") and name != "use_cache"}
    if model.config.is_encoder_decoder:
        inputs = dict(encoder_example(model, None))
        if model.generation_config.decoder_start_token_id is None:
            model.generation_config.decoder_start_token_id = _START
    elif "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return model, inputs


def describe(record: Record) -> str:
    """One line: the model, its time, and its result."""
    reason = f": {record['reason']}" if record.get("reason") else ""
    return f"{record['name']} ({record['total_seconds']:.1f} s): {record['outcome']}{reason}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the models that the arguments select; returns 1 if one gives other tokens, or fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.zoo.generation", description=__doc__)
    selection.add_arguments(parser, "generation.json")
    options = parser.parse_args(arguments)
    chosen = selection.choose(parser, options, list(huggingface.entries(mappings=GENERATING)))
    if not options.resume:
        options.output.unlink(missing_ok=True)
    run(chosen, options.output, check, describe, seconds=options.limit_seconds, jobs=options.jobs)
    records = coverage.load(options.output)
    print("\n".join(map(describe, records)))
    return 1 if any(record["outcome"] in (DIFFERS, FAILS) for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
