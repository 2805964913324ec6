"""All entries of the zoo."""

from __future__ import annotations

from tools.zoo import hand_written, huggingface, libraries
from tools.zoo.entry import Entry


def entries(attention: str | None = None) -> list[Entry]:
    """Every entry, family by family. Nothing is built, and no model is imported.

    attention: how the models of transformers spell it, `eager` or `sdpa`; by default as each chooses.
    """
    return [*huggingface.entries(attention), *hand_written.entries(), *libraries.entries()]
