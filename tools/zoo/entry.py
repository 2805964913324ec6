"""What the zoo says about a model before it is built: its name, its family, how to build it, and what it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.models import Case

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
    """The words of a table that would fill the page as a list."""
    return tuple(text.split())


@dataclass(frozen=True)
class Expected:
    """What a model's configuration says it holds; None where it does not say.

    attention: attention sites, encoder, decoder and cross-attention added up. feed_forward: feed-forward sites, a mixture of
    experts counted once a layer.
    """

    attention: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    feed_forward: int | None = None


@dataclass(frozen=True)
class Entry:
    """A model of the zoo. Nothing of it is imported before it is built.

    name: `family/type`, unique. build: the model in evaluation mode, the same weights each time, with an example of its inputs.
    expect: what its configuration says about it.
    """

    name: str
    family: str
    build: Callable[[], Case]
    expect: Callable[[], Expected] = Expected
