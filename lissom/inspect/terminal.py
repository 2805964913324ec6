"""A console for text from files, whose control characters a terminal would execute."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from lissom.io.fields import visible


class Terminal(Console):
    """A console that escapes control characters in text; the colours and cursor movements of rich itself are kept."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
