"""One HTML file: the template with the style, the scripts and the data put in. Nothing is fetched when it is opened."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parent
_SLOT = re.compile(r"\{\{([\w.]+)\}\}")


def page(title: str, data: Mapping[str, object], text: str) -> str:
    """The page of a report.

    Args:
        data: what `page_data` gives.
        text: the report for readers without JavaScript.
    """
    # A script element ends at the first `</`, whatever it holds, and `<!--` may open a comment in it.
    block = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    parts = {"title": html.escape(title), "data": block, "text": html.escape(text)}
    return _SLOT.sub(lambda match: parts[match[1]] if match[1] in parts else _read(match[1]), _read("page.html"))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
