"""`python -m tools.zoo.formats`: write models of the zoo in the formats of other runtimes.

Each file or folder is loaded by the library it is for and compared with the program before it is there, so what is written is
equal within the tolerance of the program; the rest has to be refused in a sentence, with nothing left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import lissom
from lissom.errors import LissomError, VerifyError
from tests.support.gguf_models import byte_level
from tools.zoo import huggingface, selection
from tools.zoo.check import sentence
from tools.zoo.coverage import load, put_section
from tools.zoo.entry import FAMILIES, Entry
from tools.zoo.generation import DIFFERS, EQUAL, FAILS, REFUSED

Record = dict[str, Any]


class Cell(NamedTuple):
    """A format and the passes before it. loaded: by whom."""

    format: str
    passes: str
    loaded: str
    write: Callable[[lissom.Optimized, Path], object]


def _export_gguf(optimized: lissom.Optimized, path: Path) -> object:
    return optimized.export_gguf(path, tokenizer=byte_level())


CELLS = (
    Cell("pt2", "exact", "PyTorch", lissom.Optimized.export_pt2),
    Cell("pt2", "quantize{scheme=int8-dynamic}", "PyTorch", lissom.Optimized.export_pt2),
    Cell("gguf", "exact", "llama.cpp", _export_gguf),
    Cell("gguf", "quantize{scheme=int4-weight}", "llama.cpp", _export_gguf),
    Cell("openvino", "exact", "OpenVINO", lissom.Optimized.export_openvino),
    Cell("openvino", "quantize{scheme=int8-weight}", "OpenVINO", lissom.Optimized.export_openvino),
    Cell("genai", "exact", "ONNX Runtime GenAI", lissom.Optimized.save_genai),
    Cell("genai", "quantize{scheme=int4-weight}", "ONNX Runtime GenAI", lissom.Optimized.save_genai),
    Cell(
        "compressed-tensors",
        "quantize{scheme=int4-weight,symmetric=true}",
        "transformers",
        lissom.Optimized.save_compressed,
    ),
    Cell(
        "compressed-tensors",
        "quantize{scheme=int8-dynamic}",
        "transformers",
        lissom.Optimized.save_compressed,
    ),
)
FAMILIES_WRITTEN = ("causal", "classifier", "masked", "encoder", "vision")
_SECTION = "## In formats of other runtimes\n"
_INTRODUCTION = """\
Models of transformers in the [formats of other runtimes](export.md), each loaded by its library and compared with the program:
`python -m tools.zoo.formats` does it. The error is the largest of the outputs, relative; bytes are those of the file or folder
as a part of the model's weights in float32. For GGUF files it is the largest of log probabilities, and llama.cpp itself rounds
the inputs of products with int4 weights. ONNX files are in the first table.
"""


def check(entry: Entry, report: Callable[[Record], None]) -> None:
    """Write one model in every format. report: called with the record after every cell."""
    record: Record = {"phase": "build", "cells": {}}
    report(record)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = entry.build()
        record["model"] = type(case.model).__name__
        size = 4 * sum(parameter.numel() for parameter in case.model.parameters())
        for cell in CELLS:
            record["phase"] = name = _name(cell)
            record["cells"][name] = {"outcome": FAILS, "reason": "it ran out of time or memory"}
            report(record)
            record["cells"][name] = _outcome(cell, case, size)
    report(record | {"phase": None})


def _name(cell: Cell) -> str:
    return f"{cell.format} {cell.passes}"


def _outcome(cell: Cell, case: Any, size: int) -> Record:
    """What became of a cell: the outcome, its reason, and the error and the relative size of what was written."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"written{'.pt2' if cell.format == 'pt2' else ''}"
        try:
            written: Any = cell.write(lissom.optimize(case.model, case.inputs, passes=cell.passes, checks="structural"), path)
        except Exception as error:
            if any(Path(folder).iterdir()):
                return {"outcome": FAILS, "reason": f"it left something behind, and said: {sentence(error)}"}
            kind = DIFFERS if isinstance(error, VerifyError) else REFUSED if isinstance(error, LissomError) else FAILS
            return {"outcome": kind, "reason": sentence(error)}
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        share = sum(file.stat().st_size for file in files) / size
        error = written.difference if cell.format == "gguf" else written.relative_error
        return {"outcome": EQUAL, "reason": None, "error": float(error), "share": share}


def is_wrong(record: Record) -> bool:
    """True if something is written wrongly, or is neither written nor refused in a sentence."""
    return bool({cell["outcome"] for cell in record["cells"].values()} & {DIFFERS, FAILS})


def describe(record: Record) -> str:
    """One line: the model, its time, and its cells."""
    told = (
        f"{name} {cell['outcome']}" + (f" ({why})" if (why := cell["reason"]) else "") for name, cell in record["cells"].items()
    )
    return f"{record['name']} ({record['total_seconds']:.1f} s): {'; '.join(told)}"


def headline(records: Sequence[Record]) -> str:
    """The sentence that counts outcomes."""
    counts = Counter(cell["outcome"] for record in records for cell in record["cells"].values())
    told = f"{counts[EQUAL]} written and loaded, {counts[REFUSED]} refused, {counts[DIFFERS] + counts[FAILS]} wrong"
    return f"{len(records)} models in {len(CELLS)} forms: {told}."


def section(records: Sequence[Record]) -> str:
    """The section of the coverage page: a row per form and family, then the reasons for refusals with their numbers."""
    lines = [
        _SECTION,
        _INTRODUCTION,
        f"{headline(records)}\n",
        "| format | passes | loaded by | family | models | written | largest error | bytes | refused | wrong |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for cell in CELLS:
        for family in FAMILIES:
            mine = [
                record["cells"][_name(cell)]
                for record in records
                if record["family"] == family and _name(cell) in record["cells"]
            ]
            if mine:
                lines.append(f"| {cell.format} | `{cell.passes}` | {cell.loaded} | {family} | {_counts(mine)} |")
    reasons = Counter(
        (name, str(cell["reason"]).replace(record["model"], "the model"))
        for record in records
        for name, cell in record["cells"].items()
        if cell["outcome"] == REFUSED
    )
    lines += ["", *(f"- {name}, {count} refused: {reason}" for (name, reason), count in reasons.most_common())]
    return "\n".join(lines).rstrip("\n") + "\n"


def _counts(cells: Sequence[Record]) -> str:
    """Columns of a row: models, written, largest error, bytes, refused, wrong."""
    counts, written = Counter(cell["outcome"] for cell in cells), [cell for cell in cells if cell["outcome"] == EQUAL]
    error = f"{max(cell['error'] for cell in written):.1e}" if written else ""
    share = f"{sum(cell['share'] for cell in written) / len(written):.2f}" if written else ""
    return f"{len(cells)} | {len(written)} | {error} | {share} | {counts[REFUSED]} | {counts[DIFFERS] + counts[FAILS]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the models that the arguments select; returns 1 if one is wrong.

    They are written in this process, one after the other: a process that was forked hangs in libraries with threads.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.zoo.formats", description=__doc__)
    selection.add_arguments(parser, "formats.json")
    options = parser.parse_args(arguments)
    entries = [entry for entry in huggingface.entries() if entry.family in FAMILIES_WRITTEN]
    chosen = selection.choose(parser, options, entries)
    if not options.resume:
        options.output.unlink(missing_ok=True)
    for entry in chosen:
        record, started = Record(name=entry.name, family=entry.family), time.perf_counter()
        check(entry, record.update)
        record["total_seconds"] = time.perf_counter() - started
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(describe(record), flush=True)
    records = load(options.output)
    if (path := selection.page(options)) is not None:
        put_section(path, section(records))
    print(headline(records))
    return 1 if any(map(is_wrong, records)) else 0


if __name__ == "__main__":
    sys.exit(main())
