"""Tests of the losses against formulas written out by hand, and of the form that is found for each output."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from lissom.compiler.training.batches import Batch
from lissom.compiler.training.losses import (
    Output,
    cross_entropy,
    distance,
    divergence,
    embedding_distance,
    labelled_output,
    outputs_of,
    squared_error,
)
from lissom.errors import RequirementError
from tests.support import captures
from tests.support.models import normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens


def test_the_divergence_is_that_of_two_distributions() -> None:
    found, wanted, temperature = normal(3, 5), normal(3, 5, seed=1), 2.0
    total = 0.0
    for row in range(3):
        p = [math.exp(float(item) / temperature) for item in wanted[row]]
        q = [math.exp(float(item) / temperature) for item in found[row]]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    # Five exponentials in float32.
    assert float(divergence(found, wanted, temperature)) == pytest.approx(temperature**2 * total / 3, rel=1e-5)
    assert float(divergence(found, found, 1.0)) == pytest.approx(0, abs=1e-7)


def test_embeddings_are_compared_with_teachers_and_with_each_other() -> None:
    found, wanted = normal(3, 4), normal(3, 4, seed=1)
    cosine = [[[float(a @ b / a.norm() / b.norm()) for b in rows] for a in rows] for rows in (found, wanted)]
    own = sum(float(a @ b / a.norm() / b.norm()) for a, b in zip(found, wanted, strict=True)) / 3
    between = sum((cosine[0][i][j] - cosine[1][i][j]) ** 2 for i in range(3) for j in range(3)) / 9
    assert float(embedding_distance(found, wanted)) == pytest.approx(1 - own + between, rel=1e-5)
    assert float(embedding_distance(2 * wanted, wanted)) == pytest.approx(0, abs=1e-6)


def test_hidden_states_are_compared_relative_to_their_variance() -> None:
    found, wanted = normal(6, 4), normal(6, 4, seed=1) + 5
    variance = sum(float(((row - wanted.mean(0)) ** 2).sum()) for row in wanted)
    assert float(squared_error(found, wanted)) == pytest.approx(float(((found - wanted) ** 2).sum()) / variance, rel=1e-5)


def test_padding_does_not_count() -> None:
    found, wanted = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    real = torch.tensor([[True, True, False], [True, False, False]])
    changed = found.clone()
    changed[~real] = 100.0
    assert distance("hidden", found, wanted, real) == distance("hidden", changed, wanted, real)
    assert distance("logits", found, wanted, real) != distance("logits", changed, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_hidden_states(masked: bool) -> None:
    """By the formula on the real rows alone, in float64; padding may hold NaN and gets no gradient."""
    found, wanted = normal(2, 3, 4), normal(2, 3, 4, seed=1) + 5
    real = torch.tensor([[True, True, False], [True, False, False]]) if masked else torch.ones(2, 3, dtype=torch.bool)
    found[~real], wanted[~real] = torch.nan, torch.inf
    given = wanted.clone()
    found.requires_grad_()
    loss = squared_error(found, wanted, real if masked else None)
    loss.backward()
    rows = wanted[real].double()
    spread = (rows - rows.mean(0)).square().sum()
    difference = (found[real].double() - rows).detach()
    assert float(loss.detach()) == pytest.approx(float(difference.square().sum() / spread), rel=1e-5)
    assert found.grad is not None
    torch.testing.assert_close(found.grad[real].double(), 2 * difference / spread, rtol=1e-5, atol=0)
    assert bool((found.grad[~real] == 0).all())
    assert torch.equal(wanted, given)


def test_labels_of_causal_model_are_those_of_next_token() -> None:
    program = captures.optimize(tiny_gpt2().model, tiny_gpt2().inputs).program
    outputs, _ = outputs_of(program)
    assert (outputs[0].form, outputs[0].shifted) == ("hidden", False)
    logits, labels = normal(2, 5, 7), torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(0))
    labels[0, 2] = -100
    output = Output(0, outputs[0].node, "logits", shifted=True)
    wanted = [
        -float(logits[row, at].log_softmax(-1)[labels[row, at + 1]])
        for row in range(2)
        for at in range(4)
        if labels[row, at + 1] >= 0
    ]
    assert float(cross_entropy(output, logits, labels)) == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert float(cross_entropy(output, logits, torch.full_like(labels, -100))) == 0.0


class Heads(nn.Module):
    """Outputs of every form, and some without one."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Linear(8, 3)
        self.projection = nn.Linear(8, 64, bias=False)
        self.pooler = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.relu(x)[:, 0]
        hidden = x * 2 + 1
        return self.classes(first), self.projection(first), self.pooler(first).tanh(), hidden, hidden, x.argmax(-1)


def test_forms_of_outputs() -> None:
    program = captures.optimize(seeded(Heads), normal(2, 5, 8)).program
    outputs, skipped = outputs_of(program)
    assert [item.form for item in outputs] == ["logits", "embeddings", "embeddings", "hidden"]
    assert skipped == ["output 5, 'argmax', is neither logits, scores, embeddings nor hidden states, and is not trained on"]


class Reward(nn.Module):
    """One number per row, in both usual shapes, and one per token."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.row, self.token = nn.Linear(8, 16), nn.Linear(16, 1), nn.Linear(16, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = torch.relu(self.up(x))
        return self.row(found[:, -1]), self.row(found[:, 0]).squeeze(-1), self.token(found)


def test_heads_of_one_number_give_scores() -> None:
    program = captures.optimize(seeded(Reward), normal(2, 5, 8)).program
    assert [item.form for item in outputs_of(program)[0]] == ["scores", "scores", "scores"]


@pytest.mark.parametrize("shape", [(6, 1), (6,), (2, 3, 1)])
def test_scores_are_compared_relative_to_their_variance(shape) -> None:
    found, wanted = normal(*shape), normal(*shape, seed=1)

    def by_hand(pairs: list[tuple[float, float]]) -> float:
        mean = sum(b for _, b in pairs) / len(pairs)
        return sum((a - b) ** 2 for a, b in pairs) / sum((b - mean) ** 2 for _, b in pairs)

    pairs = list(zip(found.flatten().tolist(), wanted.flatten().tolist(), strict=True))
    assert float(distance("scores", found, wanted)) == pytest.approx(by_hand(pairs), rel=1e-5)
    if len(shape) == 3:
        real = torch.tensor([[True, True, False], [True, True, True]])
        kept = [pair for index, pair in enumerate(pairs) if index != 2]
        assert float(distance("scores", found, wanted, real)) == pytest.approx(by_hand(kept), rel=1e-5)


def test_one_score_is_compared_relative_to_its_size() -> None:
    assert float(distance("scores", torch.tensor([[2.2]]), torch.tensor([[2.0]]))) == pytest.approx(0.04 / 0.04, rel=1e-5)


@pytest.mark.parametrize(
    ("case", "forms"),
    [
        (tiny_bert, ["hidden", "embeddings"]),
        (tiny_llama, ["logits"]),
        pytest.param(tiny_t5, ["hidden"], marks=pytest.mark.slow),
    ],
    ids=["bert", "llama", "t5"],
)
def test_forms_of_models(case, forms) -> None:
    found = captures.optimize(case().model, case().inputs).program
    assert [item.form for item in outputs_of(found)[0]][: len(forms)] == forms


def test_a_classifier_takes_labels() -> None:
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    program = captures.optimize(model, {"input_ids": tokens()}).program
    outputs, _ = outputs_of(program)
    rows = [Batch([tokens()], torch.zeros(2, dtype=torch.long))]
    found = labelled_output(program, outputs, rows)
    assert found is not None and (found.form, found.shifted) == ("logits", False)
    with pytest.raises(RequirementError, match=r"labels of shape \[2, 9\] fit no output: they have the shapes \[2, 3\]"):
        labelled_output(program, outputs, [Batch([tokens()], torch.zeros(2, 9, dtype=torch.long))])
    with pytest.raises(RequirementError, match="1 of 2 batches have no labels; give 'labels' in all batches of data="):
        labelled_output(program, outputs, [*rows, Batch([tokens()])])
