"""The token ids that a program kept of its original vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

Ids = Literal["graph", "tokenizer"]
Logits = Literal["full", "compact"]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A pruned vocabulary. The position of an id in `kept` is its new id: the row of the table that holds its embedding.

    Attributes:
        kept: the original ids that stay, ascending, [kept] in int64.
        size: the number of original ids.
        unknown: the original id that a dropped id is read as; None where a call with a dropped id fails.
        ids: `graph` where the program takes original ids, `tokenizer` where it takes new ids.
        logits: `full` where logits have the original width, -inf at dropped ids; `compact` where they have that of `kept`.
        tokenizer: the tokenizer for the new ids, as JSON of the tokenizers library; None where there is none.
    """

    kept: torch.Tensor
    size: int
    unknown: int | None = None
    ids: Ids = "graph"
    logits: Logits = "full"
    tokenizer: str | None = None

    @cached_property
    def new_ids(self) -> torch.Tensor:
        """The new id of each original id, -1 for dropped ids, [size]."""
        table = torch.full((self.size,), -1, dtype=torch.int64)
        table[self.kept] = torch.arange(len(self.kept))
        return table

    @property
    def dropped(self) -> torch.Tensor:
        """True for the ids that were dropped, [size]."""
        return self.new_ids < 0

    def renumbered(self, ids: torch.Tensor) -> torch.Tensor:
        """The new ids of original ids; that of the unknown token, or 0, for dropped ids."""
        new = self.new_ids.to(ids.device)[ids.long()]
        return torch.where(new < 0, self._fallback, new).to(ids.dtype)

    def readable(self, ids: torch.Tensor) -> torch.Tensor:
        """Original ids without dropped ones, in whose place is the unknown token, or the first that stays."""
        return self.kept.to(ids.device)[self.renumbered(ids).long()].to(ids.dtype)

    @property
    def _fallback(self) -> int:
        return 0 if self.unknown is None else int(self.new_ids[self.unknown])
