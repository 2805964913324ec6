"""Write the records of a run as a page: `python -m tools.zoo.coverage zoo.json docs/coverage.md`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.zoo.check import EAGER, RUNTIME
from tools.zoo.entry import FAMILIES
from tools.zoo.known import ATTENTION_LEFT, CANNOT_BE_CAPTURED, CANNOT_BE_SAVED, NOT_ON_ONNX_RUNTIME

Record = dict[str, Any]
_KINDS = ("attention", "feed_forward")
_TITLES = {EAGER: "eager", RUNTIME: "ONNX Runtime"}

_INTRODUCTION = """\
# Coverage

Every model here is tiny and has random weights: the page covers architectures, not answers. Each is captured and run through
the recipe `exact` with every pass checked, and the result is compared with the model at the example's sizes and at up to three
others. The FLOPs of each node are compared with PyTorch's `flop_counter`. `python -m tools.zoo` makes the measurements and this
page. The page [suites of other projects](suites.md) has PyTorch's operators and examples, ONNX's tests, and timm's models.

- *dynamic*: the sizes that may vary from call to call.
- *attention*, *feed-forward*: the sites found in the final program, of the number in the model's configuration; a dash if the
  configuration does not say.
- *eager*, *ONNX Runtime*: the number of sizes at which the model compiled for that backend returns the model's structure and
  values, within the tolerance of its dtype.
- *loaded*: the backends whose compiled model gives the same outputs after it is saved and loaded in a fresh process.
- *FLOPs*: the models with the same FLOPs as PyTorch's counter at every node.
- *seconds*: processor time in total.
"""

_DYNAMO = "## torch.compile\n"
_DYNAMO_INTRODUCTION = """\
The same models under `torch.compile(model, backend="lissom")` without gradients, at up to four sizes, once with the dynamic
sizes that Dynamo finds and once with `dynamic=True`. `python -m tools.zoo.dynamo` measures it. A model that Dynamo cannot run
with its own backend `eager` does not apply. A graph that Lissom cannot compile runs unchanged; the remarks say why.
"""


def load(path: Path) -> list[Record]:
    """The records of a run; if a model was run twice, the later one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list({record["name"]: record for record in map(json.loads, lines)}.values())


def page(records: Sequence[Record]) -> str:
    """The page: a table of the families, then a table of the models of each family with remarks."""
    order = {family: index for index, family in enumerate(FAMILIES)}
    ordered = sorted(records, key=lambda record: (order[record["family"]], record["name"]))
    families = [family for family in FAMILIES if any(record["family"] == family for record in ordered)]
    parts = [_INTRODUCTION, headline(ordered), _summary(ordered, families)]
    for family in families:
        parts.append(f"## {family}\n\n{_models([record for record in ordered if record['family'] == family])}")
    return "\n".join(parts)


def headline(records: Sequence[Record]) -> str:
    """The sentence that counts the models captured and equal, and the models with the expected sites."""
    run = [record for record in records if record.get("failed") not in ("expect", "build", "eager")]
    equal = sum(map(is_equal, run))
    told = [record for record in run if record.get("sites") and any(_expected(record, kind) is not None for kind in _KINDS)]
    right = sum(all(_is_right(record, kind) for kind in _KINDS) for record in told)
    return (
        f"Of {len(records)} models {len(run)} run in eager; of these {_of(equal, run)} are captured and equal. Of the "
        f"{len(told)} whose configuration gives the number of sites, {_of(right, told)} have exactly these."
        f"{_runtime_sentence(run)}{_loaded_sentence(records)} The remarks explain the others.\n"
    )


def _runtime_sentence(run: Sequence[Record]) -> str:
    """The sentence that counts the models equal on ONNX Runtime; empty if none was tried."""
    if not _ran(run, RUNTIME):
        return ""
    return f" On ONNX Runtime {_of(sum(is_equal(record, RUNTIME) for record in run), run)} are equal."


def _loaded_sentence(records: Sequence[Record]) -> str:
    """The sentence that counts the compiled models equal after saving and loading; empty if there are none."""
    saved = [
        result for record in records for result in record.get("backends", {}).values() if result.get("equal") and _asked(result)
    ]
    same = sum(bool(result.get("reloaded")) for result in saved)
    return f" Of {len(saved)} compiled models {same} give the same outputs when loaded in another process." if saved else ""


def _asked(result: Record) -> bool:
    """True if the compiled model should have been saved and loaded."""
    return "reloaded" in result or result.get("failed") == "reload"


def _ran(records: Sequence[Record], backend: str) -> bool:
    return any(backend in record.get("backends", {}) for record in records)


def _of(count: int, records: Sequence[Record]) -> str:
    return f"{count} ({count / max(len(records), 1):.1%})"


def surprises(records: Sequence[Record]) -> list[str]:
    """Models that fail and are not listed in known.py, and listed models that pass now."""
    told: list[str] = []
    for record in records:
        name, known = record["name"], record["name"] in CANNOT_BE_CAPTURED
        if is_equal(record) == known:
            told.append(f"{name} is captured now; take it out of known.py" if known else f"{name} is not equal")
        if known or not _ran([record], RUNTIME):
            continue
        known = name in NOT_ON_ONNX_RUNTIME
        if is_equal(record, RUNTIME) == known:
            told.append(
                f"{name} runs on ONNX Runtime now; take it out of known.py" if known else f"{name} is not on ONNX Runtime"
            )
        lost = [
            backend for backend, result in record["backends"].items() if result.get("equal") and not is_loaded(record, backend)
        ]
        lost = [backend for backend in lost if _asked(record["backends"][backend])]
        if name not in CANNOT_BE_SAVED:
            told += [f"{name} is not the same when loaded for {backend}" for backend in lost]
        elif not lost and any(map(_asked, record["backends"].values())):
            told.append(f"{name} is saved now; take it out of known.py")
    return told


def _is_right(record: Record, kind: str) -> bool:
    expected = _expected(record, kind)
    return expected is None or record["sites"][kind] == expected


def _summary(records: Sequence[Record], families: Sequence[str]) -> str:
    head = ["family", "models", "captured", "batch varies", "sequence varies", "eager"]
    head += [_TITLES[RUNTIME]] if _ran(records, RUNTIME) else []
    head += ["loaded", "attention sites", "feed-forward sites", "FLOPs"]
    groups = {family: [record for record in records if record["family"] == family] for family in families} | {"all": records}
    return table(head, (_family_row(family, group, _ran(records, RUNTIME)) for family, group in groups.items()))


def _family_row(name: str, records: Sequence[Record], runtime: bool) -> list[str]:
    captured = [record for record in records if record.get("captured")]
    told = [result for record in captured for result in record["backends"].values() if result.get("equal") and _asked(result)]
    return [
        name,
        str(len(records)),
        str(len(captured)),
        str(sum(_varies(record, "batch") for record in captured)),
        str(sum(_varies(record, "sequence") for record in captured)),
        str(sum(map(is_equal, records))),
        *([str(sum(is_equal(record, RUNTIME) for record in records))] if runtime else []),
        f"{sum(bool(result.get('reloaded')) for result in told)} of {len(told)}",
        _fraction(records, "attention"),
        _fraction(records, "feed_forward"),
        _counted(records),
    ]


def _counted(records: Sequence[Record]) -> str:
    """`12 of 13`: of the models whose FLOPs were counted, those that agree with PyTorch's count."""
    told = [record for record in records if "miscounted" in record]
    return f"{sum(not record['miscounted'] for record in told)} of {len(told)}"


def is_equal(record: Record, backend: str = EAGER) -> bool:
    """True if the program and the model compiled for the backend gave the model's outputs at every size tried."""
    return bool(record.get("agrees") and record["backends"].get(backend, {}).get("equal"))


def is_loaded(record: Record, backend: str) -> bool:
    """True if the compiled model gave the same outputs after it was saved and loaded in a fresh process."""
    return is_equal(record, backend) and bool(record["backends"][backend].get("reloaded"))


def _varies(record: Record, dimension: str) -> bool:
    return any(name.endswith(dimension) for name in record.get("dynamic", ()))


def _fraction(records: Iterable[Record], kind: str) -> str:
    """`12 of 13`: of the models whose configuration gives the number of sites, those where all were found."""
    told = [record for record in records if _expected(record, kind) is not None and record.get("sites")]
    return f"{sum(record['sites'][kind] == _expected(record, kind) for record in told)} of {len(told)}"


def _expected(record: Record, kind: str) -> int | None:
    return record.get("expected", {}).get(kind)


def _models(records: Sequence[Record]) -> str:
    runtime = _ran(records, RUNTIME)
    head = ["model", "captured", "dynamic", "attention", "feed-forward", "eager"]
    head += [_TITLES[RUNTIME]] if runtime else []
    return table([*head, "loaded", "seconds", "remarks"], (_model_row(record, runtime) for record in records))


def _model_row(record: Record, runtime: bool) -> list[str]:
    dynamic = ", ".join(record.get("dynamic", ())) or ("none" if record.get("captured") else "")
    return [
        record["name"].split("/", 1)[1],
        "yes" if record.get("captured") else "no",
        dynamic,
        _sites(record, "attention"),
        _sites(record, "feed_forward"),
        _equal(record, EAGER),
        *([_equal(record, RUNTIME)] if runtime else []),
        ", ".join(title for backend, title in _TITLES.items() if is_loaded(record, backend)),
        f"{record.get('total_seconds', 0):.0f}",
        remarks(record),
    ]


def _equal(record: Record, backend: str) -> str:
    if not record.get("captured") or backend not in record["backends"]:
        return ""
    return f"{record['shapes']} sizes" if is_equal(record, backend) else "no"


def _sites(record: Record, kind: str) -> str:
    if not record.get("sites"):
        return ""
    expected = _expected(record, kind)
    return f"{record['sites'][kind]} of {'—' if expected is None else expected}"


def remarks(record: Record) -> str:
    """The reasons a model is not captured, not equal, not loaded, or has fewer sites than its configuration says."""
    if record.get("failed"):
        return cell(f"{record['failed']}: {record['error']}")
    sentences = [] if record["agrees"] else [f"the program differs by {record['capture_error']:.2g} relative"]
    sentences += [_backend_remark(record["name"], backend, told) for backend, told in record["backends"].items()]
    sentences += [f"attention left ({count}): {reason}" for reason, count in record.get("skipped", {}).items()]
    sentences += [f"attention left: {ATTENTION_LEFT[record['name']]}"] if record["name"] in ATTENTION_LEFT else []
    sentences += [_different_size(record, kind) for kind in ("heads", "kv_heads", "head_dim")]
    sentences += [f"operations: {miscount}" for miscount in record.get("miscounted", ())[:1]]
    if not record.get("dynamic"):
        sentences += record.get("notes", ())[:1]
    return cell("; ".join(filter(None, sentences)))


def _backend_remark(name: str, backend: str, told: Record) -> str:
    """The failure of a model on a backend; empty if there is none."""
    title, known = _TITLES[backend], NOT_ON_ONNX_RUNTIME.get(name) if backend == RUNTIME else None
    if known and not told.get("equal"):
        return f"{title}: {known}"
    if told.get("failed"):
        return f"{title}, {told['failed']}: {told['error']}"
    if not told["equal"]:
        problem = f"differs by {told['error_found']:.2g} relative" if told["structure"] else "another structure"
        return f"{title}: {problem}"
    return "" if told.get("reloaded", True) else f"{title}: differs by {told['reload_error']:.2g} relative when loaded"


def _different_size(record: Record, kind: str) -> str:
    sites, expected = record.get("sites"), record.get("expected", {}).get(kind)
    if not sites or expected is None or not sites["attention"] or sites[kind] == [expected]:
        return ""
    return f"{kind.replace('_', ' ')} {', '.join(map(str, sites[kind]))}, where the configuration says {expected}"


def cell(text: str, longest: int = 240) -> str:
    """Text for a table cell: one line, bars escaped, truncated if long."""
    plain = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page(path: Path, records: Sequence[Record]) -> None:
    """Write the page; its section on `torch.compile` comes from another run and is kept."""
    told = path.read_text(encoding="utf-8").partition(_DYNAMO)[1:] if path.exists() else ()
    path.write_text("\n".join(filter(None, [page(records), "".join(told)])), encoding="utf-8")


def write_dynamo(path: Path, records: Sequence[Record]) -> None:
    """Write the section on `torch.compile` into the page."""
    put_section(path, dynamo_section(records))


def put_section(path: Path, section: str) -> None:
    """Replace the section of the page that has the same heading, `## …`; append it if there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    made, heading = section.rstrip("\n") + "\n", section.partition("\n")[0]
    match = re.search(rf"^{re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if match is None:
        text = f"{text.rstrip()}\n\n{made}".lstrip("\n")
    else:
        rest = text[match.end() :]
        text = f"{text[: match.start()]}{made}" + (f"\n{rest}" if rest else "")
    path.write_text(text, encoding="utf-8")


def dynamo_section(records: Sequence[Record]) -> str:
    """The section on `torch.compile`: a table of the families, then the models with remarks."""
    order = {family: index for index, family in enumerate(FAMILIES)}
    ordered = sorted(records, key=lambda record: (order[record["family"]], record["name"]))
    families = [family for family in FAMILIES if any(record["family"] == family for record in ordered)]
    groups = {family: [record for record in ordered if record["family"] == family] for family in families} | {"all": ordered}
    head = ["family", "models", "applicable", "equal", "equal, dynamic=True", "every graph a program"]
    summary = table(head, (_dynamo_row(family, group) for family, group in groups.items()))
    told = [record for record in ordered if _dynamo_remark(record)]
    remarks = table(["model", "remarks"], ([record["name"], cell(_dynamo_remark(record))] for record in told))
    return "\n".join([_DYNAMO, _DYNAMO_INTRODUCTION, f"{dynamo_headline(ordered)}\n", summary, *([remarks] if told else [])])


def dynamo_headline(records: Sequence[Record]) -> str:
    """The sentence that counts the models that Dynamo can run and that are equal."""
    run = [record for record in records if _applies(record)]
    equal = sum(not is_wrong(record) for record in run)
    return f"Of {len(records)} models Dynamo runs {len(run)}; of these {_of(equal, run)} are equal."


def _dynamo_row(name: str, records: Sequence[Record]) -> list[str]:
    run = [record for record in records if _applies(record)]
    counts = [sum(record["modes"].get(mode, {}).get("equal", False) for record in run) for mode in ("automatic", "dynamic")]
    whole = sum(all(result["graphs"] == result["lowered"] for result in record["modes"].values()) for record in run)
    return [name, str(len(records)), str(len(run)), *map(str, counts), str(whole)]


def _applies(record: Record) -> bool:
    """False for a model that Dynamo's backend `eager` cannot run either, and for one that was not built."""
    return record.get("failed") not in ("build", "sizes") and all(
        result["equal"] or result["without"] is None for result in record["modes"].values()
    )


def is_wrong(record: Record) -> bool:
    """True if the compiled model fails or gives other outputs, and Dynamo's own backend does not."""
    return _applies(record) and (bool(record.get("failed")) or not all(result["equal"] for result in record["modes"].values()))


def dynamo_outcome(result: Record) -> str:
    """The result of one mode, in a few words."""
    if not result["equal"]:
        return f"{result['problem']}" if result["without"] is None else f"fails in Dynamo: {result['without']}"
    return f"equal, {result['lowered']} of {result['graphs']} graphs programs"


def _dynamo_remark(record: Record) -> str:
    """The reasons a model does not apply, is not equal, or has graphs that run unchanged; empty if there are none."""
    if record.get("failed"):
        return f"{record['failed']}: {record['error']}"
    told = [dynamo_outcome(result) for result in record["modes"].values() if not result["equal"]]
    told += [f"unchanged: {reason}" for result in record["modes"].values() for reason in result["reasons"]]
    return "; ".join(dict.fromkeys(told))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page from a file of records."""
    parser = argparse.ArgumentParser(prog="python -m tools.zoo.coverage", description=__doc__)
    parser.add_argument("records", type=Path, help="the output of `python -m tools.zoo`")
    parser.add_argument("page", type=Path, help="the page to write")
    options = parser.parse_args(arguments)
    write_page(options.page, load(options.records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
