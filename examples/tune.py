"""MiniLM searched for the smallest program whose embeddings keep a cosine of 0.99 to the original's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lissom
from lissom.frontends.models.huggingface import load

Model = Callable[..., Any]
checkpoint = load("minilm")
lines = Path(__file__).read_text(encoding="utf-8").splitlines()  # any text of your own; hundreds of sentences in earnest
sentences = [line.strip() for line in lines if line.strip()]
data = [checkpoint.encode(sentences[at : at + 8]) for at in range(0, len(sentences), 8)]


def embeddings(model: Model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean-pooled embeddings of unit length."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


with torch.no_grad():
    wanted = [embeddings(checkpoint.model, batch) for batch in data]


def cosine(model: Model) -> float:
    """The mean cosine of the embeddings to the original's; better on sentences of its own than on `data`."""
    return float(torch.cat([(embeddings(model, batch) * one).sum(-1) for batch, one in zip(data, wanted, strict=True)]).mean())


# Twenty minutes in earnest, and goal="latency" on a machine that does nothing else.
tuned = lissom.tune(
    checkpoint.model,
    checkpoint.example_inputs,
    data=data,
    metric=cosine,
    max_drop=0.01,
    goal="memory",
    minutes=0.5,
    distill=False,
)
print(tuned.report)
again = lissom.compile(checkpoint.model, checkpoint.example_inputs, passes=tuned.pipeline, data=data, goal=None)
batch = data[0]
print("the text gives the same program again:", torch.equal(embeddings(tuned.best, batch), embeddings(again, batch)))
