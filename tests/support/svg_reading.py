"""Reads a picture back: its texts, its nodes with their places, and its curves."""

from __future__ import annotations

import re
from xml.etree import ElementTree

SVG = "{http://www.w3.org/2000/svg}"
NODES = ("node", "added", "removed", "changed")


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def texts(picture: str) -> list[str]:
    return [item.text or "" for item in parsed(picture).iter(f"{SVG}text")]


def boxes(picture: str, *kinds: str) -> list[tuple[str, tuple[float, float, float, float]]]:
    """The rectangles of these classes: what they are about, and left, top, right, bottom."""
    found = []
    for item in parsed(picture).iter(f"{SVG}rect"):
        if item.get("class") in kinds:
            x, y, width, height = (float(item.get(name)) for name in ("x", "y", "width", "height"))
            title = item.find(f"{SVG}title")
            found.append(((title.text or "") if title is not None else "", (x, y, x + width, y + height)))
    return found


def nodes(picture: str) -> list[str]:
    """The names of the nodes that are drawn; a closed module that changed has a path in place of a name."""
    return [found[1] for about, _ in boxes(picture, *NODES) if (found := re.match(r"(%[\w.]+): ", about))]


def curves(picture: str) -> list[list[float]]:
    """The numbers of each curve's path."""
    return [
        [float(number) for number in re.findall(r"-?[\d.]+", item.get("d"))] for item in parsed(picture).iter(f"{SVG}path")
    ][1:]
