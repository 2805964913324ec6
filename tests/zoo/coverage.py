"""The records of a run as a page: `python -m tests.zoo.coverage zoo.json docs/coverage.md`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.zoo.entry import FAMILIES
from tests.zoo.known import ATTENTION_LEFT, CANNOT_BE_CAPTURED

Record = dict[str, Any]
_KINDS = ("attention", "feed_forward")
_RUNTIME = "ONNX Runtime"

_INTRODUCTION = """\
# Coverage

Every model here is tiny and has random weights; what counts is its architecture, not its answers. Each is captured, run through
the recipe `exact` with every pass checked, and the result is compared with the model itself at the example's sizes and at up to
three others; operations are counted beside PyTorch's `flop_counter`, node by node. `python -m tests.zoo` makes the measurements
and this page.

- *dynamic*: which sizes may vary from call to call.
- *attention*, *feed-forward*: sites found in the final program, of those the model's configuration tells of; a dash where it
  does not say.
- *equal*: the compiled model gives the model's outputs, within the tolerance of its dtype, at how many sizes.
- *ONNX Runtime*: the same through the backend `onnxruntime`, checked in a run of its own,
  `python -m tests.zoo --backend onnxruntime`.
- *FLOPs*: models of which every node is counted as PyTorch counts it.
- *seconds*: processor time for all of it.
"""


def load(path: Path) -> list[Record]:
    """The records of a run; of a model that was run twice, the later one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list({record["name"]: record for record in map(json.loads, lines)}.values())


def with_runtime(records: Sequence[Record], runtime: Sequence[Record]) -> list[Record]:
    """The records, each with what a run through ONNX Runtime found about its model."""
    found = {record["name"]: record for record in runtime}
    return [record | ({"runtime": found[record["name"]]} if record["name"] in found else {}) for record in records]


def page(records: Sequence[Record]) -> str:
    """The page: a table of the families, then one of each family's models, then why some are missing something."""
    order = {family: index for index, family in enumerate(FAMILIES)}
    ordered = sorted(records, key=lambda record: (order[record["family"]], record["name"]))
    families = [family for family in FAMILIES if any(record["family"] == family for record in ordered)]
    parts = [_INTRODUCTION, headline(ordered), _summary(ordered, families)]
    for family in families:
        parts.append(f"## {family}\n\n{_models([record for record in ordered if record['family'] == family])}")
    return "\n".join(parts)


def headline(records: Sequence[Record]) -> str:
    """How many of the models that run in eager are captured and equal, and how many have the sites they should have."""
    run = [record for record in records if record.get("failed") not in ("expect", "build", "eager")]
    equal = sum(map(is_equal, run))
    told = [record for record in run if record.get("sites") and any(_expected(record, kind) is not None for kind in _KINDS)]
    found = sum(all(_is_right(record, kind) for kind in _KINDS) for record in told)
    return (
        f"Of {len(records)} models {len(run)} run in eager; of these {_of(equal, run)} are captured and equal. Of the "
        f"{len(told)} whose configuration tells how many sites they have, {_of(found, told)} have just these. The remarks say "
        f"what the others lack.{_runtime_sentence(records)}\n"
    )


def _runtime_sentence(records: Sequence[Record]) -> str:
    """How many of the models that are captured give the same through ONNX Runtime; nothing when none was tried."""
    tried = [record["runtime"] for record in records if "runtime" in record and is_equal(record)]
    return f" Of {len(tried)} tried on ONNX Runtime {_of(sum(map(is_equal, tried)), tried)} are equal." if tried else ""


def _of(count: int, records: Sequence[Record]) -> str:
    return f"{count} ({count / max(len(records), 1):.1%})"


def surprises(records: Sequence[Record]) -> list[str]:
    """Models that are not captured or not equal and are not known for it, and known ones that are captured now."""
    wrong = [record["name"] for record in records if not is_equal(record)]
    found = [f"{name} is not equal" for name in wrong if name not in CANNOT_BE_CAPTURED]
    return found + [
        f"{record['name']} is captured now; take it out of known.py"
        for record in records
        if is_equal(record) and record["name"] in CANNOT_BE_CAPTURED
    ]


def _is_right(record: Record, kind: str) -> bool:
    expected = _expected(record, kind)
    return expected is None or record["sites"][kind] == expected


def _summary(records: Sequence[Record], families: Sequence[str]) -> str:
    head = (
        "family",
        "models",
        "captured",
        "batch varies",
        "sequence varies",
        "equal",
        "attention sites",
        "feed-forward sites",
        "FLOPs",
    )
    groups = {family: [record for record in records if record["family"] == family] for family in families} | {"all": records}
    rows = [_family_row(family, group) for family, group in groups.items()]
    if any("runtime" in record for record in records):
        head = (*head, _RUNTIME)
        rows = [[*row, _runtime_share(group)] for row, group in zip(rows, groups.values(), strict=True)]
    return _table(head, rows)


def _runtime_share(records: Sequence[Record]) -> str:
    """`12 of 13`: of the models that are equal on eager and were tried, those equal on ONNX Runtime."""
    tried = [record["runtime"] for record in records if "runtime" in record and is_equal(record)]
    return f"{sum(map(is_equal, tried))} of {len(tried)}"


def _family_row(name: str, records: Sequence[Record]) -> list[str]:
    captured = [record for record in records if record.get("captured")]
    return [
        name,
        str(len(records)),
        str(len(captured)),
        str(sum(_varies(record, "batch") for record in captured)),
        str(sum(_varies(record, "sequence") for record in captured)),
        str(sum(is_equal(record) for record in records)),
        _share(records, "attention"),
        _share(records, "feed_forward"),
        _counted(records),
    ]


def _counted(records: Sequence[Record]) -> str:
    """`12 of 13`: of the models whose operations were counted, those counted as PyTorch does."""
    told = [record for record in records if "miscounted" in record]
    return f"{sum(not record['miscounted'] for record in told)} of {len(told)}"


def is_equal(record: Record) -> bool:
    """True when the program and the compiled model both gave the model's outputs at every size tried."""
    return bool(record.get("agrees") and record.get("equal"))


def _varies(record: Record, dimension: str) -> bool:
    return any(name.endswith(dimension) for name in record.get("dynamic", ()))


def _share(records: Iterable[Record], kind: str) -> str:
    """`12 of 13`: of the models whose configuration tells a number of sites, those where it was found."""
    told = [record for record in records if _expected(record, kind) is not None and record.get("sites")]
    return f"{sum(record['sites'][kind] == _expected(record, kind) for record in told)} of {len(told)}"


def _expected(record: Record, kind: str) -> int | None:
    return record.get("expected", {}).get(kind)


def _models(records: Sequence[Record]) -> str:
    head = ("model", "captured", "dynamic", "attention", "feed-forward", "equal", "seconds", "remarks")
    rows = [_model_row(record) for record in records]
    if any("runtime" in record for record in records):
        head = (*head[:6], _RUNTIME, *head[6:])
        rows = [[*row[:6], _runtime(record), *row[6:]] for row, record in zip(rows, records, strict=True)]
    return _table(head, rows)


def _runtime(record: Record) -> str:
    found = record.get("runtime", {})
    return f"{found['shapes']} sizes" if is_equal(found) else "no" if record.get("captured") and found else ""


def _model_row(record: Record) -> list[str]:
    dynamic = ", ".join(record.get("dynamic", ())) or ("none" if record.get("captured") else "")
    equal = f"{record['shapes']} sizes" if is_equal(record) else "no" if record.get("captured") else ""
    return [
        record["name"].split("/", 1)[1],
        "yes" if record.get("captured") else "no",
        dynamic,
        _sites(record, "attention"),
        _sites(record, "feed_forward"),
        equal,
        f"{record.get('total_seconds', 0):.0f}",
        remarks(record),
    ]


def _sites(record: Record, kind: str) -> str:
    if not record.get("sites"):
        return ""
    expected = _expected(record, kind)
    return f"{record['sites'][kind]} of {'—' if expected is None else expected}"


def remarks(record: Record) -> str:
    """Why a model is not captured, not equal, or has fewer sites than its configuration says."""
    if record.get("failed"):
        return _cell(f"{record['failed']}: {record['error']}")
    found = []
    if not is_equal(record):
        found.append(_difference(record))
    found += [f"attention left ({count}): {reason}" for reason, count in record.get("skipped", {}).items()]
    found += [f"attention left: {ATTENTION_LEFT[record['name']]}"] if record["name"] in ATTENTION_LEFT else []
    found += [_different_size(record, kind) for kind in ("heads", "kv_heads", "head_dim")]
    found += [f"operations: {found}" for found in record.get("miscounted", ())[:1]]
    runtime = record.get("runtime", {})
    if runtime and not is_equal(runtime):
        found.append(f"{_RUNTIME}: {runtime['error'] if runtime.get('failed') else _difference(runtime)}")
    if not record.get("dynamic"):
        found += record.get("notes", ())[:1]
    return _cell("; ".join(filter(None, found)))


def _difference(record: Record) -> str:
    return f"differs by {max(record['capture_error'], record['compiled_error']):.2g} relative"


def _different_size(record: Record, kind: str) -> str:
    sites, expected = record.get("sites"), record.get("expected", {}).get(kind)
    if not sites or expected is None or not sites["attention"] or sites[kind] == [expected]:
        return ""
    return f"{kind.replace('_', ' ')} {', '.join(map(str, sites[kind]))}, where the configuration says {expected}"


def _cell(text: str, longest: int = 240) -> str:
    """Text that fits a cell of a table: one line, bars escaped, cut when long."""
    plain = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.coverage", description=__doc__)
    parser.add_argument("records", type=Path, help="what `python -m tests.zoo` wrote")
    parser.add_argument("page", type=Path, help="the page to write")
    parser.add_argument("--runtime", type=Path, help="what `python -m tests.zoo --backend onnxruntime` wrote")
    options = parser.parse_args(arguments)
    runtime = load(options.runtime) if options.runtime else []
    options.page.write_text(page(with_runtime(load(options.records), runtime)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
