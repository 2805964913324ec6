"""What tests of checkpoints and ranks share: one small run of distillation, in the process of the test or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import lissom
from lissom.api import Optimized
from lissom.compiler.training.lm_head import LARGE
from lissom.passes.recover.finetune import Finetune
from tests.support.models import FeedForward, normal, seeded, tiny_bert, tokens


def data(rows: int = 8, count: int = 12) -> list[torch.Tensor]:
    return [normal(rows, 5, 8, seed=seed) for seed in range(count)]


def train(options: str, *, rows: int = 8, progress: Callable[..., None] | None = None) -> Optimized:
    """Distill half of a feed-forward."""
    text = f"prune-neurons{{keep=0.5}},distill{{learning_rate=0.01,{options}}}"
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
    text = f"prune-heads{{keep=0.5}},distill{{blockwise=0.3,{options}}}"
    return lissom.optimize(case.model, case.inputs, passes=text, data=batches)


class Layers(nn.Module):
    """Two linear layers; without a bias the last one projects embeddings."""

    def __init__(self, hidden: int, features: int, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, features, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def margin(output: object, labels: torch.Tensor | None) -> torch.Tensor:
    """A loss of the caller's."""
    assert isinstance(output, torch.Tensor) and labels is not None
    return nn.functional.multi_margin_loss(output, labels)


def train_form(form: str, rows: int) -> Optimized:
    """Train for a loss of every form, on batches of so many rows."""
    x = [normal(rows, 8, seed=seed) for seed in range(8)]
    text = "steps=20,learning_rate=0.003,precision=fp32"
    classes = [{"x": item, "labels": item[:, :3].argmax(-1)} for item in x]
    own = Finetune(steps=20, learning_rate=0.003, precision="fp32", loss=margin)
    (hidden, features, bias), data, passes = {
        "embeddings": ((16, 64, False), x, f"low-rank{{keep=0.5}},distill{{{text}}}"),
        "scales": ((16, 64, False), x, f"quantize{{scheme=int4-weight,group=4}},distill{{{text}}}"),
        "labels": ((16, 3, True), classes, f"low-rank{{keep=0.5}},distill{{{text}}}"),
        "regression": ((16, 1, True), [{"x": item, "labels": item.sum(-1)} for item in x], f"finetune{{{text}}}"),
        "own": ((16, 3, True), classes, [own]),
    }[form]
    return lissom.optimize(seeded(lambda: Layers(hidden, features, bias)), {"x": normal(4, 8)}, passes=passes, data=data)


def train_words(options: str) -> Optimized:
    """Distill a language model over a large vocabulary, with labels, of which some are unknown.

    A label is the number after its token: labels equal to the tokens would be those of the next token, which are random.
    """
    data = []
    for seed in range(6):
        ids = torch.randint(0, LARGE, (5, 4), generator=torch.Generator().manual_seed(seed))
        data.append({"input": ids, "labels": ((ids + 1) % LARGE).where(ids % 5 > 0, -100)})
    model = seeded(lambda: nn.Sequential(nn.Embedding(LARGE, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, LARGE)))
    text = f"prune-neurons{{keep=0.5}},distill{{steps=10,precision=fp32,{options}}}"
    return lissom.optimize(model, {"input": data[0]["input"]}, passes=text, data=data)


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
