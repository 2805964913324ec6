"""`python -m tools.zoo.passes`: pruning of vocabularies and experts, rotations and 4-bit formats on models of the zoo.

Each pipeline runs with every check on the captured model, and those of the KV cache on the decoder that `compile_generation`
captures. The compiled model is then compared with the model, or with the decoder compiled without the pipeline.
"""

from __future__ import annotations

import math
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch.utils import _pytree as pytree

import lissom
from lissom.artifacts.facts import Facts
from lissom.compiler.ir.vocabulary import Vocabulary
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.driver.compile import compile_captured
from lissom.driver.options import Settings
from lissom.errors import LissomError, PassError, VerifyError
from lissom.frontends.capture.export import capture
from lissom.frontends.generation.decoder import capture_decoder
from lissom.runtime.compiled_model import CompiledModel
from tools.zoo import selection
from tools.zoo.catalogue import entries
from tools.zoo.check import answer, other_samples, sentence
from tools.zoo.entry import Entry
from tools.zoo.generation import BATCH, MAX_LENGTH, generating
from tools.zoo.known import ILL_CONDITIONED

WHOLE: Sequence[str] = (
    "prune-vocabulary{keep=60}",
    "prune-vocabulary{keep=60,logits=compact}",
    "rotate{where=heads}",
    "rotate{where=residual}",
    "rotate{where=residual,basis=pca}",
    "prune-experts{keep=0.75}",
    "prune-experts{keep=0.75,criterion=frequency}",
    "quantize{scheme=mxfp4-weight}",
    "quantize{scheme=mxfp8-weight}",
    "quantize{scheme=nvfp4-weight}",
)
"""Pipelines of models without a KV cache."""
CACHED: Sequence[str] = (
    "rotate{where=cache,basis=hadamard}",
    "rotate{where=cache,basis=balanced}",
    "rotate{where=heads}",
    "prune-vocabulary{keep=60}",
    "quantize-cache{bits=4}",
    "rotate{where=cache,basis=balanced},rotate{where=heads},quantize-cache{bits=4}",
)
"""Pipelines of decoders with a KV cache."""
EQUAL, LOSSY, IDLE, REFUSED, WRONG = "equal", "lossy", "nothing to do", "refused", "wrong"
Record = dict[str, Any]
_CACHE = "cache: "
_LOSSY = ("prune-experts", "quantize")
_IMPLAUSIBLE = 1.0
"""The error of an output that has nothing to do with the model's."""
_STEPS = 4
"""Single tokens after the prompt."""
_SECTION = "## Passes\n"
_INTRODUCTION = """\
Pipelines on models of the zoo, with every pass checked and the example inputs as calibration data. The compiled models are
compared with the models at several sizes; those after *cache* with decoders of `compile_generation`, for a prompt and single
tokens. `python -m tools.zoo.passes` measures it. *equal*: within the tolerance of the dtype; with a pruned vocabulary, the
logits of ids that stay, for texts of such ids. *error*: √(Σ(y - y₀)² / Σy₀²) of the lossy pipelines, the median and the
largest; models with random weights lose more than trained ones.
"""


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Run every pipeline on a model. report: called with the record after every pipeline."""
    record: Record = {"phase": "capture", "failed": None, "error": None, "pipelines": {}}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            for spelled, outcome in (*_whole(entry), *_cached(entry)):
                record["pipelines"][spelled] = outcome
                report(record | {"phase": spelled})
        except LissomError as error:
            record |= {"failed": record["phase"], "error": sentence(error)}
    report(record | {"phase": None})


def _whole(entry: Entry) -> Iterator[tuple[str, Record]]:
    """The pipelines of a model without a KV cache, each with its outcome."""
    case = entry.build()
    answer(case, case.args, case.kwargs)  # some models complete themselves in their first call, and capture refuses that
    captured = capture(case.model, case.args, case.kwargs)
    signature = captured.program.signature
    samples = [captured.example, *other_samples(case, signature, captured.example)]
    wanted = [answer(case, *signature.arguments(sample))[1] for sample in samples]
    facts = Facts.of(case.model)

    def outputs(spelled: str) -> tuple[CompiledModel, list[list[object]]]:
        settings = Settings(passes=spelled, data=[case.inputs] * 2, goal=None, progress=lambda *_: None)
        fast = compile_captured(lambda: captured, torch.device("cpu"), settings, facts)
        return fast, [pytree.tree_leaves(fast(*args, **kwargs)) for args, kwargs in map(signature.arguments, samples)]

    for spelled in WHOLE:
        found = _outcome(spelled, partial(outputs, spelled), wanted, tolerance_of(captured.program))
        is_known = entry.name in ILL_CONDITIONED and "was rolled back" in found["reason"]
        yield spelled, found | ({"outcome": REFUSED} if is_known else {})


def _cached(entry: Entry) -> Iterator[tuple[str, Record]]:
    """The pipelines of a decoder with a KV cache, each with its outcome; none for other models."""
    prepared = generating(entry) if entry.family == "causal" else None
    if prepared is None or prepared[0].config.is_encoder_decoder or "input_ids" not in prepared[1]:
        return
    model, inputs = prepared
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    try:
        captured = capture_decoder(model, max_length=MAX_LENGTH, batch=BATCH)
    except LissomError:
        return  # tools.zoo.generation reports these models

    def outputs(spelled: str) -> tuple[CompiledModel, list[list[object]]]:
        with mock.patch("lissom.generation.compile.capture_decoder", lambda *_, **__: captured):
            fast: Any = lissom.compile_generation(
                model, max_length=MAX_LENGTH, batch=BATCH, passes=spelled, data=[ids], goal=None, progress=lambda *_: None
            )
        steps = [fast.step(ids, mask), *(fast.step(ids[:, at : at + 1]) for at in range(_STEPS))]
        return fast.compiled, [[logits.clone()] for logits in steps]

    _, wanted = outputs("")
    for spelled in CACHED:
        yield _CACHE + spelled, _outcome(spelled, partial(outputs, spelled), wanted, tolerance_of(captured.program))


def _outcome(
    spelled: str,
    outputs: Callable[[], tuple[CompiledModel, list[list[object]]]],
    wanted: Sequence[Sequence[object]],
    allowed: float,
) -> Record:
    """What a pipeline did to a model. allowed: the relative error of an exact pipeline."""
    try:
        fast, actual = outputs()
    except (VerifyError, PassError) as error:
        return {"outcome": WRONG, "reason": sentence(error)}
    except LissomError as error:
        return {"outcome": REFUSED, "reason": sentence(error)}
    except Exception as error:
        return {"outcome": WRONG, "reason": sentence(error), "traceback": traceback.format_exc()[-3000:]}
    names = [part.partition("{")[0] for part in spelled.split("},")]
    steps = [step for step in fast.report.history.steps if step.spelling.partition("{")[0] in names]
    told = [*(f"{skip.place}: {skip.reason}" for step in steps for skip in step.skipped)]
    told += [note for step in steps for note in (*step.notes, step.reverted) if note]
    if not any(step.rewritten for step in steps):
        return {"outcome": IDLE, "reason": "; ".join(told) or "no place has its form"}
    try:
        pairs = [pair for row in zip(wanted, actual, strict=True) for pair in zip(*row, strict=True)]
        pairs = [_of_kept_ids(fast.program.vocabulary, *pair) for pair in pairs]
    except ValueError as error:
        return {"outcome": WRONG, "reason": sentence(error)}
    largest, distance = max(relative_error(*pair) for pair in pairs), max(_distance(*pair) for pair in pairs)
    record = {"largest": largest, "error": distance, "told": told, "bytes": fast.program.parameter_bytes}
    if any(name.startswith(_LOSSY) for name in names):
        return record | {"outcome": LOSSY if distance < _IMPLAUSIBLE else WRONG, "reason": f"error {distance:.2g}"}
    return record | {"outcome": EQUAL if largest <= allowed else WRONG, "reason": f"differs by {largest:.2g}"}


def _of_kept_ids(vocabulary: Vocabulary | None, wanted: object, actual: object) -> tuple[object, object]:
    """The two values at the logits of ids that stay, where they are logits. Raises ValueError where a dropped id has one."""
    if vocabulary is None or not isinstance(wanted, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return wanted, actual
    if wanted.shape[-1:] != (vocabulary.size,) or not wanted.is_floating_point():
        return wanted, actual
    if actual.shape[-1] == len(vocabulary.kept):
        return wanted[..., vocabulary.kept], actual
    if torch.isfinite(actual).all():
        return wanted, actual
    if not bool((actual[..., vocabulary.dropped] == -torch.inf).all()):
        raise ValueError("a dropped id has a logit")
    return wanted[..., vocabulary.kept], actual[..., vocabulary.kept]


def _distance(wanted: object, actual: object) -> float:
    """√(Σ(y - y₀)² / Σy₀²) over finite values; infinite where the places of others differ."""
    if not isinstance(wanted, torch.Tensor) or not wanted.is_floating_point():
        return 0.0
    if not isinstance(actual, torch.Tensor) or actual.shape != wanted.shape:
        return math.inf
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(actual)):
        return math.inf
    a, b = wanted[finite].double(), actual[finite].double()
    return float(((b - a).square().sum() / a.square().sum().clamp_min(1e-30)).sqrt()) if finite.any() else 0.0


def describe(record: Record) -> str:
    """One line for the model, and one for each pipeline that is neither equal nor lossy."""
    outcomes: Mapping[str, Record] = record["pipelines"]
    counts = Counter(found["outcome"] for found in outcomes.values())
    start = f"{record['name']} ({record['total_seconds']:.1f} s): "
    if record.get("failed"):
        return f"{start}{record['failed']}: {record['error']}"
    lines = [
        f"\n    {spelled} {found['outcome']}: {found['reason']}"
        for spelled, found in outcomes.items()
        if found["outcome"] in (REFUSED, WRONG)
    ]
    return start + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + "".join(lines)


def is_wrong(record: Record) -> bool:
    """True if a pipeline gave wrong values or a raw error, or the process ended."""
    ended = record.get("failed") is not None and "CaptureError" not in str(record.get("error"))
    return ended or any(found["outcome"] == WRONG for found in record.get("pipelines", {}).values())


def headline(records: Sequence[Record]) -> str:
    """The sentence that counts models and outcomes."""
    counts = Counter(found["outcome"] for record in records for found in record["pipelines"].values())
    shown = ", ".join(f"{counts[outcome]} {outcome}" for outcome in (EQUAL, LOSSY, IDLE, REFUSED, WRONG))
    return f"{len(records)} models, {counts.total()} pipelines run: {shown}."


def section(records: Sequence[Record]) -> str:
    """The section of the coverage page: a row per pipeline, then the reasons of refusals with the number of models."""
    lines = [_SECTION, _INTRODUCTION, f"{headline(records)}\n"]
    lines += [
        "| pipeline | models | equal | lossy | error | nothing to do | refused | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for spelled in (*WHOLE, *(_CACHE + cached for cached in CACHED)):
        found = [record["pipelines"][spelled] for record in records if spelled in record["pipelines"]]
        counts = Counter(outcome["outcome"] for outcome in found)
        errors = sorted(outcome["error"] for outcome in found if outcome["outcome"] == LOSSY)
        told = f"{median(errors):.2g}, {errors[-1]:.2g}" if errors else ""
        of = " | ".join(str(counts[outcome]) for outcome in (IDLE, REFUSED, WRONG))
        lines.append(f"| `{spelled}` | {len(found)} | {counts[EQUAL]} | {counts[LOSSY]} | {told} | {of} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pipelines on the models that the arguments select; returns 1 if one is wrong."""
    return selection.compare_all(arguments, "passes", __doc__, list(entries()), check, describe, section, headline, is_wrong)


if __name__ == "__main__":
    sys.exit(main())
