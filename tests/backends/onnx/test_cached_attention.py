"""Tests of lissom.backends.onnx.cached_attention: which attentions over a cache become one operator, and what that gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import CacheLayerMixin

from lissom.backends.base import confirm
from lissom.backends.eager.backend import Eager
from lissom.backends.onnx.export import export_onnx
from lissom.backends.onnx.variants import CACHE, write_variant
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.onnxruntime.opening import Opener
from lissom.backends.onnxruntime.session import Session
from lissom.compiler.ir.program import Program
from lissom.frontends.capture.export import Capture, capture
from tests.backends.test_state import TOLERANCE, errors
from tests.support.caches import HEAD_DIM, PLACES, TOKENS, WIDTH, Decoder, call_of, captured_decoder, decoder, generation
from tests.support.models import VOCABULARY, normal, seeded
from tests.support.neighbours import all_but_slow

EXPORTS: dict[Program, ir.Model] = {}


def fused(found: Capture) -> tuple[Session, int, list[dict[str, object]]]:
    """A session of the model with attention over caches as one operator, how many there are, and what they are told."""
    if found.program not in EXPORTS:
        EXPORTS[found.program] = export_onnx(found.program, found.example, decompose=False)
    model, places = write_variant(EXPORTS[found.program], [CACHE])
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    told = [
        {name: attribute.value for name, attribute in node.attributes.items()} | {"inputs": len(node.inputs)} for node in nodes
    ]
    backend = OnnxRuntime()
    opener = Opener(backend.name, found.program, backend._session_options(found.program), backend.accuracy_level)
    return opener.open(model), places[CACHE], told


DECODERS = [(batch, padded, window) for batch in (1, 2) for padded in (True, False) for window in (0, 4)]


@pytest.mark.parametrize(("batch", "padded", "window"), all_but_slow(DECODERS, (2, True, 0)))
def test_it_gives_what_the_program_gives(batch, padded, window):
    found = decoder(batch, padded, window)
    session, count, told = fused(found)
    assert count == 2
    for options in told:
        # Whatever hides keys beside causality and a window is the eleventh input.
        assert options["inputs"] == (11 if padded else 7)
        assert options.get("local_window_size", 0) == (0 if padded else window)
        assert (options["num_heads"], options["kv_num_heads"]) == (4 * batch, 2 * batch)
    confirm("it", session, found.program, found.example)
    assert errors(Eager().build(found.program, found.example), session, generation(batch)) < TOLERANCE
    assert all(memory.now is memory.next for memory in session._memories.values())


def test_row_of_nothing_but_padding_is_as_in_program():
    found = decoder()
    session = fused(found)[0]
    calls = [call_of(0, 6, padding=6), call_of(6, 1, padding=7), call_of(7, 3, padding=7)]
    assert errors(Eager().build(found.program, found.example), session, calls) < TOLERANCE


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (-3, 5), (PLACES, 1), (PLACES - 1, 2), (1 << 40, 1)])
def test_missing_places_are_refused_before_anything_is_written(start, count):
    session = fused(decoder())[0]
    session(call_of(0, 6))
    kept = {name: tensor.clone() for name, tensor in session.state().items()}
    sample = call_of(0, count)
    sample[3] = torch.tensor([start])
    with pytest.raises(RuntimeError, match="out of data bounds"):
        session(sample)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in session.state().items())


class Attention(nn.Module):
    """Attention over a cache alone; its mask is a condition on the numbers of keys' and queries' places."""

    def __init__(self, condition: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.condition = condition
        self.register_buffer("keys", torch.zeros(1, 2, PLACES, HEAD_DIM))
        self.register_buffer("values", torch.zeros(1, 2, PLACES, HEAD_DIM))

    def forward(self, q: torch.Tensor, k: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        places = torch.arange(q.shape[2]) + start
        self.keys.index_copy_(2, places, k)
        self.values.index_copy_(2, places, k + 1)
        mask = self.condition(torch.arange(PLACES), places[:, None])
        return functional.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        (lambda key, query: query >= key, 1),
        (lambda key, query: key < query + 1, 1),
        (lambda key, query: (key <= query) & (key > query - 4) & (query - 3 <= key), 1),
        (lambda key, query: (key <= query) & (key % 2 == 0), 1),
        (lambda key, query: key <= query + 1, 0),
        (lambda key, query: (key <= query) | (key == 3), 0),
        (lambda key, query: key > query - 4, 0),
        (lambda key, query: key + 1 <= query + 1, 0),
        (lambda key, query: (key <= query[:1]) & (key <= query + 2), 0),
    ],
    ids=["turned", "below the next", "windows", "every other", "the next", "or a prefix", "no order", "shifted", "the first's"],
)
def test_mask_counts_if_it_hides_later_keys(condition, count):
    inputs = (normal(1, 4, 5, HEAD_DIM), normal(1, 2, 5, HEAD_DIM, seed=1), torch.tensor([2]))
    found = capture(Attention(condition), inputs, dynamic={"q": {2: TOKENS}, "k": {2: TOKENS}})
    session, recognised, _ = fused(found)
    assert recognised == count
    calls = [[inputs[0], inputs[1], torch.tensor([start])] for start in (0, 5, 3)]
    assert errors(Eager().build(found.program, found.example), session, calls) < TOLERANCE


class Shared(Decoder):
    """A decoder that returns the keys of its first layer too."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(input_ids, attention_mask, position_ids, start)
        return logits, self.layers[0].keys * 2  # pyright: ignore


@pytest.mark.slow
def test_unknown_places_and_shared_caches_are_left_alone():
    assert fused(decoder(consecutive=False))[1] == 0
    assert fused(captured_decoder(seeded(Shared), 2))[1] == 1


class Buffers(CacheLayerMixin):
    """A layer of a cache of transformers whose keys and values are a module's buffers."""

    def __init__(self, layer: nn.Module, start: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.start, self.is_initialized = layer.keys, layer.values, start, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffers are there."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object):
        places = torch.arange(key_states.shape[2]) + self.start
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return PLACES, 0

    def get_seq_length(self) -> torch.Tensor:
        return self.start

    def get_max_cache_shape(self) -> int:
        return PLACES

    def get_max_length(self) -> int:
        return PLACES


class Llama(nn.Module):
    """A Llama of transformers with its cache in buffers."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config)
        self.caches = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.caches:
            for name in ("keys", "values"):
                layer.register_buffer(name, torch.zeros(batch, 2, PLACES, HEAD_DIM))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        cache = Cache(layers=[Buffers(layer, start) for layer in self.caches])
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        return self.model(input_ids, attention_mask=attention_mask, position_ids=position_ids, **{name: cache}).logits


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_of_transformers_is_recognised(batch):
    found = captured_decoder(seeded(lambda: Llama(batch)), batch)
    session, count, _ = fused(found)
    assert count == 2
    assert errors(Eager().build(found.program, found.example), session, generation(batch)) < TOLERANCE
