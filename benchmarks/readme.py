"""Updates the tables of benchmarks/README.md, each between its own marks, for the `--update` of the benchmarks."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent / "README.md"


def put_table(name: str, text: str) -> None:
    """Put the text between `<!-- name -->` and the next `<!-- end -->`."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    page = README.read_text(encoding="utf-8")
    README.write_text(marked.sub(lambda found: found[1] + text + found[2], page), encoding="utf-8")
