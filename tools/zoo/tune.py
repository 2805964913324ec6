"""`python -m tools.zoo.tune`: search the best program of twenty models of the zoo, and check what is found.

Of every model: whether there is an answer, whether its drop, measured here again, is within the bound, whether its text gives
the same program again, bit by bit, and how long the search took.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch.utils import _pytree as pytree

import lissom
from tests.support.models import Case
from tools.zoo import selection
from tools.zoo.check import answer, sentence
from tools.zoo.coverage import put_section
from tools.zoo.entry import Entry, words

KINDS: Mapping[str, tuple[str, ...]] = {
    "vision": words("vision/vit vision/dinov2 vision/swin timm/deit3 timm/convit"),
    "encoder–decoder": words("encoder-decoder/t5 encoder-decoder/bart encoder-decoder/pegasus encoder-decoder/m2m_100"),
    "mixture of experts": words("causal/mixtral causal/qwen3_moe causal/olmoe causal/granitemoe"),
    "hybrid": words("causal/jamba causal/bamba causal/falcon_h1 causal/lfm2 causal/recurrent_gemma"),
    "speech": words("speech/wav2vec2 speech/whisper"),
}
"""The models by the kind of architecture."""
MOST_SECONDS = 180.0
_BATCHES, _MAX_DROP = 4, 0.05
_SECTION = "## On other models\n"
_INTRODUCTION = """\
`python -m tools.zoo.tune` searches tiny models with random weights, {minutes:g} minutes each, for `goal="{goal}"` with a
relative output error of at most {max_drop:g}. *Within the bound*: the error of the answer, measured again against the original
module. *Same program*: `lissom.compile` with the text gives equal outputs. Gains are medians; those of trained weights differ.
"""
Record = dict[str, Any]


def batches(case: Case) -> list[Mapping[str, object]]:
    """Batches like the inputs of a case with other values and without padding, so that every output counts."""
    named = dict(case.kwargs or {str(at): value for at, value in enumerate(case.args)})
    return [{name: _other(value, seed) for name, value in named.items()} for seed in range(_BATCHES)]


def _other(value: object, seed: int) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    generator = torch.Generator().manual_seed(seed)
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator)
    if int(value.max()) <= 1:
        return torch.ones_like(value)
    return torch.randint(int(value.min()), int(value.max()) + 1, value.shape, generator=generator)


def check(entry: Entry, report: Callable[[Record], None], *, minutes: float, goal: str) -> None:
    """Search one model. report: called with the record after every phase."""
    record: Record = {"phase": "build", "failed": None, "error": None, "minutes": minutes, "goal": goal}
    report(record)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(entry.build(), record, report)
    except Exception as error:
        record |= {"failed": record["phase"], "error": sentence(error)}
    record["phase"] = None
    report(record)


def _check(case: Case, record: Record, report: Callable[[Record], None]) -> None:
    data = [batch if case.kwargs else tuple(batch.values()) for batch in batches(case)]
    calls = [batch if isinstance(batch, tuple) else () for batch in data], [batch if case.kwargs else {} for batch in data]
    with torch.no_grad():
        wanted = [answer(case, *call)[1] for call in zip(*calls, strict=True)]
    record["phase"] = "search"
    report(record)
    started = time.perf_counter()
    options = {"goal": record["goal"], "minutes": record["minutes"], "max_drop": _MAX_DROP}
    tuned = lissom.tune(case.model, case.inputs, data=data, **options)
    record["seconds"] = round(time.perf_counter() - started, 1)
    exact, chosen = tuned.report.candidates[0], tuned.report.chosen
    memory = record["goal"] == "memory"
    record |= {
        "phase": "again",
        "pipeline": tuned.pipeline,
        "candidates": len(tuned.report.candidates),
        "failures": [candidate.failed for candidate in tuned.report.candidates if candidate.failed],
        "notes": list(tuned.report.notes),
        "drop": chosen.drop,
        "gain": exact.cost(memory) / max(chosen.cost(memory), 1e-9),
    }
    report(record)
    outputs = [pytree.tree_leaves(tuned.best(*args, **kwargs)) for args, kwargs in zip(*calls, strict=True)]
    record["measured"] = _relative_error(wanted, outputs)
    again = lissom.compile(
        case.model, case.inputs, passes=tuned.pipeline, data=data, goal=None, backend=tuned.backend, progress=lambda *_: None
    )
    others = [pytree.tree_leaves(again(*args, **kwargs)) for args, kwargs in zip(*calls, strict=True)]
    record["same"] = all(
        _equal(one, other) for left, right in zip(outputs, others, strict=True) for one, other in zip(left, right, strict=True)
    )


def _equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return one == other


def _relative_error(wanted: Sequence[Sequence[object]], actual: Sequence[Sequence[object]]) -> float:
    """√(Σ‖y − y₀‖² / Σ‖y₀‖²) of the worst output over all batches."""
    worst = 0.0
    for output in zip(zip(*wanted, strict=True), zip(*actual, strict=True), strict=True):
        pairs = [pair for pair in zip(*output, strict=True) if isinstance(pair[0], torch.Tensor)]
        pairs = [(one.double().flatten(), other.double().flatten()) for one, other in pairs if one.is_floating_point()]
        if pairs:
            one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
            finite = one.isfinite()
            worst = max(worst, float((other - one)[finite].norm() / one[finite].norm().clamp_min(1e-30)))
    return worst


def is_right(record: Record) -> bool:
    """True if the search has a result within the bound and the time, which its text gives again."""
    return not record.get("failed") and record["same"] and _is_within(record) and record["seconds"] <= MOST_SECONDS


def _is_within(record: Record) -> bool:
    return record["measured"] <= _MAX_DROP * (1 + 1e-3) + 1e-5


def describe(record: Record) -> str:
    """One line: the model and its result."""
    start = f"{record['name']} ({record['total_seconds']:.1f} s): "
    if record.get("failed"):
        return f"{start}{record['failed']}: {record['error']}"
    same = "same program" if record["same"] else "ANOTHER PROGRAM"
    within = "within" if _is_within(record) else "OVER"
    more = "".join(f"\n    failed: {reason}" for reason in record["failures"])
    return (
        f"{start}{record['gain']:.2f} x in {record['seconds']:.0f} s, {record['candidates']} candidates, "
        f"drop {record['drop']:.3g}, measured {record['measured']:.3g}, {within} the bound, {same}{more}"
    )


def section(records: Sequence[Record]) -> str:
    """The section of the page: a row for each kind of model."""
    given = {"max_drop": _MAX_DROP, "minutes": records[0]["minutes"], "goal": records[0]["goal"]}
    lines = [_SECTION, _INTRODUCTION.format_map(given)]
    lines += ["| kind | models | answered | within the bound | same program | gain | most seconds |", "|---|" + "---:|" * 6]
    for kind, names in KINDS.items():
        mine = [record for record in records if record["name"] in names]
        done = [record for record in mine if not record.get("failed")]
        if done:
            gains = sorted(record["gain"] for record in done)
            lines.append(
                f"| {kind} | {len(mine)} | {len(done)} | {sum(map(_is_within, done))} | {sum(row['same'] for row in done)} | "
                f"{gains[len(gains) // 2]:.2f} x | {max(record['seconds'] for record in done):.0f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Search the models that the arguments select; returns 1 if an answer is missing or wrong."""
    from tools.zoo.catalogue import entries
    from tools.zoo.runner import warm_zoo

    parser = argparse.ArgumentParser(prog="python -m tools.zoo.tune", description=__doc__)
    selection.add_arguments(parser, "zoo-tune.json")
    parser.add_argument("--minutes", type=float, default=0.75, help="of each search (default %(default)s)")
    parser.add_argument("--goal", default="memory", help="latency, throughput or memory (default %(default)s)")
    options = parser.parse_args(arguments)
    named = [name for names in KINDS.values() for name in names]
    chosen = selection.choose(parser, options, [entry for entry in entries() if entry.name in named])
    search = partial(check, goal=options.goal)
    brief, whole = partial(search, minutes=0.01), partial(search, minutes=options.minutes)
    warm = partial(warm_zoo, {entry.family for entry in chosen}, brief)
    records = selection.run_chosen(options, chosen, whole, describe, warm)
    if options.page is not None:
        put_section(options.page, section(records))
    wrong = [record for record in records if not is_right(record)]
    right = len(records) - len(wrong)
    print(f"{len(records)} models, {right} answered in time, within the bound, by a text that gives the same program")
    print("\n".join(map(describe, wrong)), end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
