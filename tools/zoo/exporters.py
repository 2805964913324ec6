"""`python -m tools.zoo.exporters`: run every model of transformers in the zoo through the backend of `transformers.exporters`.

What the exporters' own tests do for a backend: a model is exported, run on its example, saved, loaded and run again, and the
outputs are compared with the model's. Models that generate are exported for generation too, and their greedy tokens compared.
A model that transformers' own exporter to torch.export does not take is listed and not counted.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch.utils import _pytree as pytree
from transformers.exporters import DynamoConfig, DynamoExporter, ExportedModel

from lissom.compiler.verify.divergence import relative_error
from lissom.errors import CaptureError, LissomError
from lissom.integrations.transformers.exported_generation import ExportedGenerator
from lissom.integrations.transformers.exporters import LissomConfig, LissomExporter
from tools.zoo import huggingface, selection
from tools.zoo.check import sentence
from tools.zoo.entry import FAMILIES, Entry
from tools.zoo.generation import DIFFERS, ELSEWHERE, EQUAL, FAILS, GREEDY, REFUSED, compared, generating

Record = dict[str, Any]
_Outcome = tuple[str | None, str | None]
_ALLOWED = 2e-4
"""Relative: a model and its export add in another order, layer after layer, in float32."""
_OPTIONS = {"checks": "off", "goal": None}
_SECTION = "## Through transformers' exporters\n"
_INTRODUCTION = """\
Models exported by `LissomExporter`, saved, loaded by `ExportedModel.from_pretrained` and run, and exported for generation where
transformers generates with them: `python -m tools.zoo.exporters` does it. A model that transformers' own exporter to
torch.export does not take, or returns other numbers for, is not counted.
"""
_COLUMNS = ("exported", "generated")


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Export and run one model. report: called with the record after every phase."""
    record: Record = {"phase": "build"} | {name: None for column in _COLUMNS for name in (column, f"{column}_why")}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        case = entry.build()
        for column, step in zip(_COLUMNS, (_export, _generate), strict=True):
            report(record | {"phase": column, column: FAILS, f"{column}_why": "it ran out of time or memory"})
            record[column], record[f"{column}_why"] = _outcome(step, entry, case.model, case.inputs)
    report(record | {"phase": None})


def _outcome(step: Callable[..., _Outcome], entry: Entry, model: Any, inputs: Any) -> _Outcome:
    """The outcome of a step and its reason; None for a step that does not apply."""
    try:
        return step(entry, model, inputs)
    except CaptureError as error:
        elsewhere = "cannot be captured by transformers' exporter" in str(error)
        return ELSEWHERE if elsewhere else REFUSED, sentence(error)
    except LissomError as error:
        return REFUSED, sentence(error)
    except Exception as error:
        return FAILS, sentence(error)


def _export(entry: Entry, model: Any, inputs: dict[str, Any]) -> _Outcome:
    wanted = model(**copy.deepcopy(inputs))
    exported = LissomExporter().export(model, copy.deepcopy(inputs), LissomConfig(**_OPTIONS))
    with tempfile.TemporaryDirectory() as folder:
        exported.save_pretrained(folder)
        again = ExportedModel.from_pretrained(folder)
    for each in (exported, again):
        error = _error(wanted, each(**copy.deepcopy(inputs)))
        if not error <= _ALLOWED:
            own = DynamoExporter().export(model, copy.deepcopy(inputs), DynamoConfig(dynamic=True))
            elsewhere = not _error(wanted, own(**copy.deepcopy(inputs))) <= _ALLOWED
            return ELSEWHERE if elsewhere else DIFFERS, f"the outputs differ by {error:.2g} relative"
    return EQUAL, None


def _error(wanted: object, actual: object) -> float:
    """The largest relative difference of two outputs; infinity if they have other tensors."""
    one, other = ([leaf for leaf in pytree.tree_leaves(each) if isinstance(leaf, torch.Tensor)] for each in (wanted, actual))
    if [leaf.shape for leaf in one] != [leaf.shape for leaf in other]:
        return float("inf")
    return max((relative_error(*pair) for pair in zip(one, other, strict=True)), default=0.0)


def _generate(entry: Entry, model: Any, inputs: dict[str, Any]) -> _Outcome:
    prepared = generating(entry) if entry.family == "causal" else None
    if prepared is None:
        return None, None
    model, given = prepared
    # The zoo leaves the cache out, to capture what it captures.
    model.config.get_text_config().use_cache = model.generation_config.use_cache = True
    try:
        wanted = model.generate(**given, **GREEDY)
    except Exception as error:
        return ELSEWHERE, f"transformers: {sentence(error)}"
    exported = LissomExporter().export_for_generation(model, copy.deepcopy(given), LissomConfig(**_OPTIONS))
    return compared(model, given, wanted, ExportedGenerator(exported).generate(**given, **GREEDY))


def describe(record: Record) -> str:
    """One line: the model, its time, and its results."""
    told = (f"{name} {record[name]}" + (f" ({why})" if (why := record[f"{name}_why"]) else "") for name in _COLUMNS)
    return f"{record['name']} ({record['total_seconds']:.1f} s): {'; '.join(told)}"


def headline(records: Sequence[Record]) -> str:
    """The sentence that counts the models with equal outputs and tokens."""
    counts = {column: Counter(record[column] for record in records if record.get(column)) for column in _COLUMNS}
    one, two = ((count[EQUAL], count.total() - count[ELSEWHERE]) for count in counts.values())
    return f"{one[0]} of {one[1]} models give equal outputs, and {two[0]} of {two[1]} equal tokens."


def section(records: Sequence[Record]) -> str:
    """The section of the coverage page: a row per family, then the models that are not equal, with the reasons."""
    lines = [
        _SECTION,
        _INTRODUCTION,
        f"{headline(records)}\n",
        "| family | exported | equal | refused | wrong | generated | equal | refused | wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        cells: list[int] = []
        for column in _COLUMNS:
            counts = Counter(record[column] for record in records if record["family"] == family and record.get(column))
            cells += [counts.total() - counts[ELSEWHERE], counts[EQUAL], counts[REFUSED], counts[DIFFERS] + counts[FAILS]]
        if any(cells):
            lines.append(f"| {family} | {' | '.join(map(str, cells))} |")
    others = [
        f"- {record['name']}, {column}: {record[column]}, {record[f'{column}_why']}"
        for record in sorted(records, key=lambda record: record["name"])
        for column in _COLUMNS
        if record.get(column) in (REFUSED, DIFFERS, FAILS)
    ]
    return "\n".join([*lines, "", *others]).rstrip("\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the models that the arguments select; returns 1 if one gives other outputs or tokens, or fails."""
    is_wrong = lambda record: bool({record.get(column) for column in _COLUMNS} & {DIFFERS, FAILS})  # noqa: E731
    chosen = list(huggingface.entries())
    return selection.compare_all(arguments, "exporters", __doc__, chosen, check, describe, section, headline, is_wrong)


if __name__ == "__main__":
    sys.exit(main())
