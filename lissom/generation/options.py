"""The options of `compile_generation`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lissom.driver.options import BuildSettings
from lissom.generation.scoring import NextToken


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(BuildSettings):
    """The keywords of `lissom.compile_generation`."""

    max_length: int
    batch: int = 1
    all_logits: bool = False
    draft: str | nn.Module | None = None
    encoder_inputs: Mapping[str, object] | None = None
    data: Iterable[torch.Tensor | Mapping[str, object]] = ()
    metric: Callable[[NextToken], float] | None = None
