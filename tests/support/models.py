"""Small models the tests share: hand-written ones, and transformers of two layers with random weights.

Every builder gives a new model in evaluation mode with the same weights each time; `captured` gives a program of one, captured
once a session: copy it before changing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import transformers
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.frontends.capture.export import Capture, capture

VOCABULARY = 37


@dataclass(frozen=True)
class Case:
    """A model with an example of its inputs: positional as a tuple, keywords as a dict."""

    model: nn.Module
    inputs: tuple[object, ...] | dict[str, object]

    @property
    def args(self) -> tuple[object, ...]:
        return self.inputs if isinstance(self.inputs, tuple) else ()

    @property
    def kwargs(self) -> dict[str, object]:
        return self.inputs if isinstance(self.inputs, dict) else {}


class FeedForward(nn.Module):
    """Norm, up, GELU, down, and the input added back."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))


class Counter(nn.Module):
    """Keeps state: adds up how many rows it has seen, and returns them with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(x.shape[0])
        return self.linear(x) + self.seen


class Nested(nn.Module):
    """Takes a mapping of pairs and a flag, returns a nest."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, past: dict[str, tuple[torch.Tensor, torch.Tensor]], double: bool = False) -> dict[str, object]:
        keys, values = past["layer"]
        keys = self.linear(keys) * (2 if double else 1)
        return {"past": {"layer": (keys, values + 1)}, "sum": [keys.sum(), None], "double": double}


class Branching(nn.Module):
    """Decides on the values of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x * 2
        return x - 1


class Blocked(nn.Module):
    """Folds its sequence into blocks of four tokens, so that it takes only multiples of four."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = x.reshape(x.shape[0], -1, 4, x.shape[-1])
        return self.linear(blocks).softmax(2).reshape(x.shape)


class Tied(nn.Module):
    """A language model whose LM head is its embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens).tanh())


class Convolution(nn.Module):
    """Two convolutions, one of them in groups, and a product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(6, 8, 3, padding=1)
        self.second = nn.Conv1d(8, 4, 3, stride=2, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(self.first(x).relu())
        return y @ y.transpose(1, 2)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The module with the same random weights at every call, in evaluation mode; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same ones at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    """Token ids of the tiny transformers' vocabulary."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def feed_forward() -> Case:
    return Case(seeded(FeedForward), (normal(2, 5, 8),))


def counter() -> Case:
    return Case(seeded(Counter), (normal(3, 4),))


def nested() -> Case:
    return Case(seeded(Nested), {"past": {"layer": (normal(2, 3, 4), normal(2, 3, 4, seed=1))}, "double": True})


def branching() -> Case:
    return Case(seeded(Branching), (normal(2, 3),))


def blocked() -> Case:
    return Case(seeded(Blocked), (normal(2, 8, 8),))


def tied() -> Case:
    return Case(seeded(Tied), (tokens(),))


def convolution() -> Case:
    return Case(seeded(Convolution), (normal(2, 6, 9),))


def tiny_bert(attention: str = "sdpa", vocabulary: int = VOCABULARY) -> Case:
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, attn_implementation=attention,
    )  # fmt: skip
    return _with_mask(lambda: transformers.BertModel(config))


def tiny_llama(attention: str = "sdpa", **options: object) -> Case:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=32, use_cache=False, attn_implementation=attention, **options,
    )  # fmt: skip
    return _with_mask(lambda: transformers.LlamaForCausalLM(config))


def tied_llama() -> nn.Module:
    """A decoder of one layer whose LM head is its embedding, with sizes that schemes of 32 neighbours take."""
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def tiny_t5() -> Case:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return _with_mask(lambda: transformers.T5EncoderModel(config))


def tiny_gpt2(attention: str = "sdpa") -> Case:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False, attn_implementation=attention,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return _with_mask(lambda: transformers.GPT2Model(config))


def _with_mask(build: Callable[[], nn.Module]) -> Case:
    return Case(seeded(build), {"input_ids": tokens(), "attention_mask": torch.ones(2, 5, dtype=torch.long)})


CASES: dict[str, Callable[[], Case]] = {
    "feed_forward": feed_forward,
    "counter": counter,
    "nested": nested,
    "blocked": blocked,
    "tied": tied,
    "convolution": convolution,
    "bert": tiny_bert,
    "bert_eager": lambda: tiny_bert("eager"),
    "llama": tiny_llama,
    "llama_eager": lambda: tiny_llama("eager"),
    "t5": tiny_t5,
    "gpt2": tiny_gpt2,
}


@cache
def capture_of(name: str) -> Capture:
    """The capture of one of CASES, made once a session."""
    case = CASES[name]()
    return capture(case.model, case.args, case.kwargs)


def captured(name: str) -> Program:
    """A program of one of CASES that may be changed; it shares weights with the others of that name."""
    return capture_of(name).program.copy()
