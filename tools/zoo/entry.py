"""A model of the zoo before it is built: its name, its family, its builder, and its expected sites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.support.models import Case

FAMILIES = (
    "causal",
    "classifier",
    "masked",
    "encoder",
    "vision",
    "encoder-decoder",
    "speech",
    "hand-written",
    "timm",
    "torchvision",
    "x-transformers",
)


def words(text: str) -> tuple[str, ...]:
    """The words of a text, for lists that would take a line per item."""
    return tuple(text.split())


@dataclass(frozen=True)
class Expected:
    """The expected sites according to a model's configuration; None if it does not say.

    attention: attention sites, with encoder, decoder and cross-attention added up. feed_forward: feed-forward sites; a mixture
    of experts counts once per layer.
    """

    attention: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    feed_forward: int | None = None


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. It is imported only when it is built.

    name: `family/type`, unique. build: returns the model in evaluation mode with reproducible weights, and example inputs.
    expect: returns the expected sites.
    """

    name: str
    family: str
    build: Callable[[], Case]
    expect: Callable[[], Expected] = Expected
