"""What tests of checkpoints and ranks share: one small run of distillation, in the process of the test or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

import lissom
from lissom.api import Optimized
from tests.models import FeedForward, normal, seeded, tiny_bert, tokens

OPTIONS = "learning_rate=0.01,precision=fp32"


def data(rows: int = 8, count: int = 12) -> list[torch.Tensor]:
    return [normal(rows, 5, 8, seed=seed) for seed in range(count)]


def train(options: str, *, rows: int = 8, progress: Callable[..., None] | None = None) -> Optimized:
    """Distill half of a feed-forward."""
    text = f"prune-neurons{{keep=0.5}},distill{{{OPTIONS},{options}}}"
    return lissom.optimize(seeded(FeedForward), normal(2, 5, 8), passes=text, data=data(rows), progress=progress)


def train_bert(options: str) -> Optimized:
    """Distill a BERT of large weights, so that pruning costs something, on seven rows of which some have padding."""
    case = tiny_bert()
    with torch.no_grad():
        for item in case.model.parameters():
            item.mul_(5.0)
    batches = []
    for seed in range(6):
        ids = tokens(7, 9, seed)
        mask = torch.ones_like(ids)
        mask[::2, 6:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    text = f"prune-heads{{keep=0.5}},distill{{precision=fp32,blockwise=0.3,{options}}}"
    return lissom.optimize(case.model, case.inputs, passes=text, data=batches)


def digest(found: Optimized) -> str:
    """Of all weights, bit by bit."""
    made = hashlib.sha256()
    for tensor in found.program.weights().values():
        made.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def notes(found: Optimized) -> str:
    return "\n".join(found.report.history.steps[-1].notes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
