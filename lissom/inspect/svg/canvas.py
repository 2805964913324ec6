"""An SVG picture: rectangles, text and curves, in colors for light and dark. Sizes are in CSS pixels."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

CODE_WIDTH = 6.7
"""The width of a character of code, at most."""
LABEL_WIDTH = 7.2
"""The mean width of a character of a label."""
_CONTROL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML does not allow, not even escaped."""
_CLASS = re.compile(r'class="([^"]*)"')
_LIGHT: Mapping[str, str] = {
    ".back": "fill:#f6f7f9",
    "text": "fill:#1c2430",
    ".quiet": "fill:#667085",
    ".frame": "fill:#fff;stroke:#cfd5de",
    ".node": "fill:#eef2f8;stroke:#9fb0c8",
    ".folded": "fill:#e9f0fd;stroke:#2f6fdb",
    ".value": "fill:none;stroke:#9fb0c8",
    ".added": "fill:#def5e5;stroke:#12733a",
    ".removed": "fill:#fde5e2;stroke:#b3261e",
    ".changed": "fill:#fdf0cf;stroke:#8a5a00",
    ".edge": "stroke:#8b98ab",
    ".head": "fill:#8b98ab",
    ".seen": "fill:#2f6fdb",
    ".partly": "fill:#9cbdf3",
    ".unseen": "fill:#e7ebf1",
    ".collective": "fill:#fdf0cf;stroke:#8a5a00",
    ".rank0": "fill:#4e79c4",
    ".rank1": "fill:#e08a3c",
    ".rank2": "fill:#5aa469",
    ".rank3": "fill:#b3589a",
    ".heat1": "fill:#fbe9dc;stroke:#d9a98a",
    ".heat2": "fill:#f7c9a8;stroke:#c9824f",
    ".heat3": "fill:#f0a070;stroke:#b05a26",
    ".heat4": "fill:#e5704a;stroke:#8f3413",
}
_DARK: Mapping[str, str] = {
    ".back": "fill:#12161d",
    "text": "fill:#e3e8ef",
    ".quiet": "fill:#93a0b4",
    ".frame": "fill:#1a2029;stroke:#3a4557",
    ".node": "fill:#243044;stroke:#5b6f8f",
    ".folded": "fill:#22324d;stroke:#7fb0ff",
    ".value": "fill:none;stroke:#5b6f8f",
    ".added": "fill:#173625;stroke:#6fd694",
    ".removed": "fill:#421f1e;stroke:#ff9b92",
    ".changed": "fill:#3d3115;stroke:#f0c060",
    ".edge": "stroke:#65748b",
    ".head": "fill:#65748b",
    ".seen": "fill:#7fb0ff",
    ".partly": "fill:#35507d",
    ".unseen": "fill:#222a36",
    ".collective": "fill:#3d3115;stroke:#f0c060",
    ".rank0": "fill:#6f9cf0",
    ".rank1": "fill:#d98b45",
    ".rank2": "fill:#6bbd7f",
    ".rank3": "fill:#c77ab0",
    ".heat1": "fill:#33261f;stroke:#7a5a48",
    ".heat2": "fill:#4d3222;stroke:#a06f4c",
    ".heat3": "fill:#6e3f20;stroke:#cf8a58",
    ".heat4": "fill:#95431b;stroke:#ffa878",
}
RANK_COLORS = 4
"""The number of colors of ranks."""
_FONTS = (
    "text{font:12px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}"
    ".code{font:11px ui-monospace,Consolas,'DejaVu Sans Mono',monospace}.strong{font-weight:600}.title{font-size:14px}"
    ".edge{fill:none}.again{stroke-dasharray:4 3}"
)


class Canvas:
    """Collects the elements of a picture.

    Args:
        about: whether rectangles say what they are about when the pointer is on them.
    """

    def __init__(self, *, about: bool = True) -> None:
        self._about = about
        self._elements: list[str] = []

    def rect(self, x: float, y: float, width: float, height: float, kind: str, *, radius: float = 5, about: str = "") -> None:
        """A rectangle.

        Args:
            kind: its class.
            about: shown when the pointer is on it.
        """
        title = f"><title>{_escaped(about)}</title></rect>" if about and self._about else "/>"
        place = f'x="{x:.6g}" y="{y:.6g}" width="{width:.6g}" height="{height:.6g}"'
        self._elements.append(f'<rect {place} rx="{radius:g}" class="{kind}"{title}')

    def text(self, x: float, y: float, words: str, kind: str = "", *, anchor: str = "start") -> None:
        """A line of text.

        Args:
            x: of its start, `middle` or `end`.
            y: of its baseline.
        """
        kinds = f' class="{kind}"' if kind else ""
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._elements.append(f'<text x="{x:.6g}" y="{y:.6g}"{kinds}{at}>{_escaped(words)}</text>')

    def curve(self, steps: str, kind: str = "edge", *, arrow: bool = False) -> None:
        """A line.

        Args:
            steps: the commands of its path.
        """
        head = ' marker-end="url(#head)"' if arrow else ""
        self._elements.append(f'<path d="{steps}" class="{kind}"{head}/>')

    def svg(self, width: float, height: float, title: str) -> str:
        """The whole picture.

        Args:
            title: for readers who do not see it.
        """
        used = {".back", ".head", "text", *(f".{kind}" for element in self._elements for kind in _kinds(element))}
        themes, dark = (
            "".join(f"{kind}{{{look}}}" for kind, look in theme.items() if kind in used) for theme in (_LIGHT, _DARK)
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
                f'viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
                f"<title>{_escaped(title)}</title>",
                f"<style>{_FONTS}{themes}@media (prefers-color-scheme:dark){{{dark}}}</style>",
                '<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
                '<path d="M0 0L6 3L0 6Z" class="head"/></marker></defs>',
                '<rect width="100%" height="100%" class="back"/>',
                *self._elements,
                "</svg>\n",
            ]
        )


def _kinds(element: str) -> list[str]:
    """The classes of an element."""
    match = _CLASS.search(element)
    return match[1].split() if match else []


def _escaped(words: str) -> str:
    return html.escape(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", words))
