"""Tests of finetune: labels of every kind, a loss of the caller's, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lissom.errors import InputError, RequirementError
from lissom.passes.recover.finetune import Finetune
from tests.support import captures
from tests.support.harness import check_golden
from tests.support.models import VOCABULARY, normal, seeded, tokens
from tests.support.neighbours import all_but_slow


class Classifier(nn.Module):
    """Classifies rows."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def labelled(seed: int) -> dict[str, torch.Tensor]:
    x = normal(16, 8, seed=seed)
    return {"x": x, "labels": (x @ normal(8, 3, seed=100)).argmax(-1)}


DATA = [labelled(seed) for seed in range(12)]


def accuracy(program) -> float:
    fresh = labelled(99)
    with torch.no_grad():
        return float((program(fresh["x"]).argmax(-1) == fresh["labels"]).float().mean())


def test_rewrites() -> None:
    """Weights change, and nothing else."""
    text = "finetune{steps=20,learning_rate=0.01}"
    found = captures.optimize(seeded(Classifier), {"x": normal(4, 8)}, passes=text, data=DATA)
    check_golden("finetune", f"{found.program.text()}\n{found.report.history.steps[-1].summary}\n")


def test_leaves_other_graphs_alone() -> None:
    texts = [
        captures.optimize(seeded(Classifier), {"x": normal(4, 8)}, passes=passes, data=DATA).program.text()
        for passes in ("exact", "finetune{steps=2}")
    ]
    assert texts[0] == texts[1]


def _language_model(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with inputs, and labels as transformers takes them; the label of one token is not known."""
    small = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    labels = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(0))
    known = labels.clone()
    known[1, 3] = -100
    if name == "t5":
        config = transformers.T5Config(
            **small, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, use_cache=False
        )
        model = seeded(lambda: transformers.T5ForConditionalGeneration(config))
        behind = model.prepare_decoder_input_ids_from_labels(known)
        return model, {"input_ids": tokens(), "decoder_input_ids": behind, "labels": known}
    if name == "mamba":
        config = transformers.MambaConfig(**small, hidden_size=16, state_size=4, num_hidden_layers=2, use_cache=False)
        return seeded(lambda: transformers.MambaForCausalLM(config)), {"input_ids": labels, "labels": known}
    config = transformers.GPT2Config(**small, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False)
    return seeded(lambda: transformers.GPT2LMHeadModel(config)), {"input_ids": labels, "labels": known}


@pytest.mark.parametrize("name", all_but_slow(["gpt2", "t5", "mamba"], "gpt2", "mamba"))
def test_labels_are_those_of_transformers(name) -> None:
    """A decoder's are the tokens it reads; an encoder-decoder reads them one place later."""
    model, batch = _language_model(name)
    with torch.no_grad():
        wanted = float(model(**batch).loss)
    assert _first_loss(model, batch) == pytest.approx(wanted, rel=1e-4)


def test_labels_that_are_already_those_of_the_next_token() -> None:
    """Where the data move them, as many training loops do, they are not moved again."""
    model, batch = _language_model("gpt2")
    ids = batch["input_ids"]
    moved = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    with torch.no_grad():
        logits = model(input_ids=moved["input_ids"]).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), moved["labels"].flatten())
    assert _first_loss(model, moved) == pytest.approx(float(wanted), rel=1e-4)


def _first_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """The loss before training."""
    inputs = {name: item for name, item in batch.items() if name != "labels"}
    found = captures.optimize(model, inputs, passes="finetune{steps=1}", data=[batch] * 4)
    return found.report.history.steps[-1].curve[0].held_out


def test_learns_a_task() -> None:
    found = captures.optimize(
        seeded(Classifier), {"x": normal(4, 8)}, passes="finetune{steps=300,learning_rate=0.01}", data=DATA
    )
    assert accuracy(seeded(Classifier)) < 0.6 < 0.8 < accuracy(found.program)
    step = found.report.history.steps[-1]
    assert step.spelling == "finetune{steps=300,learning_rate=0.01}" and step.curve[-1].held_out < step.curve[0].held_out


def test_distillation_takes_labels_too() -> None:
    text = "prune-neurons{keep=0.5},distill{steps=300,learning_rate=0.01,alpha=1}"
    found = captures.optimize(seeded(Classifier), {"x": normal(4, 8)}, passes=text, data=DATA)
    assert accuracy(found.program) > 0.8  # the teacher knows nothing of the task


def test_one_number_per_row_is_regression() -> None:
    data = [{"x": (x := normal(16, 8, seed=seed)), "labels": x.sum(-1)} for seed in range(12)]
    model = seeded(lambda: Classifier(1))
    found = captures.optimize(model, {"x": normal(4, 8)}, passes="finetune{steps=300,learning_rate=0.01}", data=data)
    fresh = normal(50, 8, seed=99)
    with torch.no_grad():
        errors = [float((call(fresh)[:, 0] - fresh.sum(-1)).square().mean()) for call in (model, found.program)]
    assert errors[1] < 0.3 * errors[0]


def test_tokens_learn_their_own_label() -> None:
    model = seeded(lambda: nn.Sequential(nn.Embedding(37, 8), nn.Linear(8, 37)))
    data = [{"input": tokens(4, 6, seed), "labels": (tokens(4, 6, seed) + 1) % 37} for seed in range(12)]
    text = "finetune{steps=200,learning_rate=0.05,embeddings=true}"
    found = captures.optimize(model, {"input": tokens()}, passes=text, data=data)
    fresh = tokens(8, 6, 99)
    assert float((found.program(fresh).argmax(-1) == (fresh + 1) % 37).float().mean()) > 0.8


def test_a_loss_of_ones_own() -> None:
    def margin(output: object, labels: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(output, torch.Tensor) and labels is not None
        return nn.functional.multi_margin_loss(output, labels)

    passes = [Finetune(steps=300, learning_rate=0.01, loss=margin)]
    found = captures.optimize(seeded(Classifier), {"x": normal(4, 8)}, passes=passes, data=DATA)
    assert accuracy(found.program) > 0.8
    assert found.report.history.steps[-1].spelling == "finetune{steps=300,learning_rate=0.01,loss=margin}"


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([{"x": normal(4, 8)}] * 2, RequirementError, "finetune needs labels: give 'labels' in each batch of data="),
        ([DATA[0], {"x": normal(4, 8)}], RequirementError, "1 of 2 batches have no labels"),
        ([DATA[0] | {"labels": [1, 2]}], InputError, "batch 0 of data= has labels of type list; give a tensor"),
    ],
)
def test_requirements(data, error, message) -> None:
    with pytest.raises(error, match=message):
        captures.optimize(seeded(Classifier), {"x": normal(4, 8)}, passes="finetune{steps=1}", data=data)
