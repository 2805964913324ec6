"""Tests of eliminate-dead-tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from lissom.backends.base import Backend
from lissom.passes.prune.eliminate_dead_tokens import EliminateDeadTokens
from tests.support import captures
from tests.support.harness import check_golden, every_backend, rewrite
from tests.support.models import VOCABULARY, FeedForward, normal, seeded, tokens
from tests.support.neighbours import all_but_slow

_SMALL: dict[str, object] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_DECODER: dict[str, object] = {"vocab_size": VOCABULARY, "use_cache": False, "bos_token_id": 0, "eos_token_id": 0}
Answer = Callable[[torch.Tensor], object]


class Layer(nn.Module):
    """One layer over [batch, tokens, 8], causal or not, with key heads shared by query heads; `answer` chooses tokens."""

    def __init__(self, answer: Answer, causal: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.answer, self.causal, self.masked = answer, causal, masked
        self.q, self.k, self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)
        self.feed_forward = FeedForward()

    def forward(self, x: torch.Tensor) -> object:
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        length = x.shape[1]
        mask = (torch.arange(length)[:, None] - torch.arange(length)).abs() < 3 if self.masked else None
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=True)
        return self.answer(self.feed_forward(x + self.o(mixed.transpose(1, 2).flatten(2))))


def by_row(x: torch.Tensor) -> torch.Tensor:
    """A position a row that no layer has to be computed for; some count from the end."""
    positions = torch.remainder(torch.arange(x.shape[0]), 3) - 1
    return x[torch.arange(x.shape[0]), positions]


CHOICES: dict[str, Answer] = {
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "second": lambda x: x[:, 1:2],
    "two": lambda x: x[:, 1:3].tanh(),
    "last two": lambda x: x[:, -2:],
    "by row": by_row,
}


def test_rewrites() -> None:
    _, history = rewrite(EliminateDeadTokens(), seeded(lambda: Layer(CHOICES["first"])), normal(2, 6, 8))
    check_golden("eliminate_dead_tokens", history.diff(0, 1))


@pytest.mark.parametrize(
    "answer",
    [lambda x: x, lambda x: x[:, 1:], lambda x: (x[:, 0], x[:, 1]), lambda x: (x[:, 0], x), lambda x: x.mean(1)],
    ids=["all", "most", "two apart", "one and all", "mean"],
)
def test_leaves_other_graphs_alone(answer: Answer) -> None:
    _, history = rewrite(EliminateDeadTokens(), seeded(lambda: Layer(answer)), normal(2, 6, 8))
    assert history.diff(0, 1) == ""
    assert history.steps[1].summary == "nothing to do"


@pytest.mark.parametrize("form", ["plain", "causal", "masked"])
@pytest.mark.parametrize("choice", CHOICES)
def test_numbers(choice: str, form: str) -> None:
    module = seeded(lambda: Layer(CHOICES[choice], form == "causal", form == "masked"))
    program, history = rewrite(EliminateDeadTokens(), module, normal(2, 6, 8))
    before, after = (step.size.flops for step in history.steps)
    assert after < 0.75 * before
    for batch, length in ((2, 6), (1, 4), (5, 9)):
        x = normal(batch, length, 8, seed=1)
        wanted = copy.deepcopy(module).double()(x.double())
        # Sums of up to twelve float32 products of order 1.
        torch.testing.assert_close(program(x).double(), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", ["plain", "causal", "masked"])
def test_last_few_positions_or_all_of_fewer(form: str) -> None:
    """A decoder's logits of the last 16 tokens, in calls of any number of tokens."""
    module = seeded(
        lambda: Layer(lambda x: x[:, x.shape[1] - torch.sym_min(x.shape[1], 4) :], form == "causal", form == "masked")
    )
    program, history = rewrite(EliminateDeadTokens(), module, normal(2, 12, 8))
    before, after = (step.size.flops for step in history.steps)
    # Attention without a mask of its own counts queries from the first key, and stays whole.
    assert after < (0.75 if form == "causal" else 0.6) * before
    for batch, length in ((2, 12), (1, 2), (3, 4), (5, 9)):
        x = normal(batch, length, 8, seed=1)
        wanted = copy.deepcopy(module).double()(x.double())
        assert wanted.shape[1] == min(4, length)
        # Sums of up to twelve float32 products of order 1.
        torch.testing.assert_close(program(x).double(), wanted, rtol=0, atol=2e-6)


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=VOCABULARY, **_SMALL))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=2, num_labels=3, **_SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, pad_token_id=0, num_labels=3, **_DECODER)
    return transformers.GPT2ForSequenceClassification(config)


def llama(kind: str = "ForSequenceClassification") -> nn.Module:
    config = transformers.LlamaConfig(num_key_value_heads=1, pad_token_id=0, num_labels=3, **_SMALL, **_DECODER)
    return getattr(transformers, f"Llama{kind}")(config)


class FirstOfT5(nn.Module):
    """A T5 encoder, of which the first token is read."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        self.encoder = transformers.T5EncoderModel(config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder(input_ids, attention_mask).last_hidden_state[:, 0]


def text(**more: object) -> dict[str, object]:
    ids = tokens(2, 6).clamp_min(1)
    ids[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **more}


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "bert, first token": (bert, text()),
    "vit, class token": (vit, {"pixel_values": normal(2, 3, 8, 8)}),
    "gpt2, token by row": (gpt2, text()),
    "llama, token by row": (llama, text()),
    "llama, last logits": (lambda: llama("ForCausalLM"), text(logits_to_keep=1)),
    "t5 encoder, first token": (FirstOfT5, text()),
}


@pytest.mark.parametrize("name", all_but_slow(MODELS, "bert, first token", "vit, class token", "llama, last logits"))
def test_transformers_compute_their_last_layer_where_it_is_read(name: str) -> None:
    build, given = MODELS[name]
    optimized = captures.optimize(seeded(build), given, passes="eliminate-dead-tokens")
    step = optimized.report.history.steps[-1]
    # Of two layers, the second is left with its keys and values: from 0.62 to 0.70 of everything, by the sizes.
    assert step.size.flops < 0.75 * optimized.report.history.steps[0].size.flops


def test_positions_that_a_layer_computes_are_left() -> None:
    class Searching(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y[torch.arange(x.shape[0]), y[..., 0].argmax(1)]

    _, history = rewrite(EliminateDeadTokens(), seeded(lambda: Searching(lambda x: x)), normal(2, 6, 8))
    assert history.diff(0, 1) == ""


@every_backend
def test_composes(backend: Backend) -> None:
    module = seeded(lambda: Layer(by_row, causal=True))
    fast = captures.compile(module, normal(3, 6, 8), passes="eliminate-dead-tokens", backend=backend)
    x = normal(4, 7, 8, seed=3)
    # Sums of up to twelve float32 products of order 1.
    torch.testing.assert_close(fast(x), module(x), rtol=0, atol=5e-6)
