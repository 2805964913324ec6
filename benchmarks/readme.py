"""Updates the tables of benchmarks/README.md, each between its own marks, for the `--update` of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from lissom.inspect.machine import device_name, instruction_sets

README = Path(__file__).parent / "README.md"


def processor_kind() -> str:
    """`intel amx`, `amd avx512`, `amd avx2` …: tables of different kinds of processors stand beside each other."""
    vendor = next((word for word in ("amd", "intel") if word in device_name(torch.device("cpu")).lower()), "other")
    kind = next(
        (kind for kind in ("amx", "avx512", "avx2") if any(isa.startswith(kind) for isa in instruction_sets())), "other"
    )
    return f"{vendor} {kind}"


def put_table(name: str, text: str) -> None:
    """Put the text between `<!-- name -->` and the next `<!-- end -->`. Raises: SystemExit where there is no such place."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    page = README.read_text(encoding="utf-8")
    if marked.search(page) is None:
        raise SystemExit(f"{README} has no place for the table: add <!-- {name} --> and <!-- end --> to it")
    README.write_text(marked.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")
