"""All entries of the zoo."""

from __future__ import annotations

from tools.zoo import hand_written, huggingface, libraries, users_models
from tools.zoo.entry import Entry


def entries(attention: str | None = None) -> list[Entry]:
    """Every entry, family by family. No model is built or imported.

    attention: the attention implementation in transformers, `eager` or `sdpa`; each model's default if None.
    """
    return [*huggingface.entries(attention), *hand_written.entries(), *users_models.entries(), *libraries.entries()]
