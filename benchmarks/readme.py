"""Updates the tables of benchmarks/README.md, each between its own marks, for the `--update` of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lissom.measure.machine import device_name, instruction_sets

README = Path(__file__).parent / "README.md"


def processor_kind() -> str:
    """`intel amx`, `amd avx512`, `amd avx2` …: tables of different kinds of processors stand beside each other."""
    vendor = next((word for word in ("amd", "intel") if word in device_name(torch.device("cpu")).lower()), "other")
    kind = next(
        (kind for kind in ("amx", "avx512", "avx2") if any(isa.startswith(kind) for isa in instruction_sets())), "other"
    )
    return f"{vendor} {kind}"


def put_table(name: str, text: str, *, by_processor: bool = False) -> None:
    """Put the text between `<!-- name -->` and the next `<!-- end -->`.

    by_processor: each kind of processor has a table, `<!-- name amd avx2 -->`; a new one comes after the last.

    Raises: SystemExit where there is no such place.
    """
    page = README.read_text(encoding="utf-8")
    mark = f"{name} {processor_kind()}" if by_processor else name
    table = f"<!-- {mark} -->\n{text}<!-- end -->"
    own, others = (list(_tables(pattern).finditer(page)) for pattern in (re.escape(mark), rf"{re.escape(name)} \w+ \w+"))
    if own:
        page = page[: own[0].start()] + table + page[own[0].end() :]
    elif by_processor and others:
        page = f"{page[: others[-1].end()]}\n\n{table}{page[others[-1].end() :]}"
    else:
        raise SystemExit(f"{README} has no place for the table: add <!-- {mark} --> and <!-- end --> to it")
    README.write_text(page, encoding="utf-8")


def _tables(mark: str) -> re.Pattern[str]:
    """Finds tables by the pattern of their mark."""
    return re.compile(rf"<!-- {mark} -->\n.*?<!-- end -->", re.DOTALL)
