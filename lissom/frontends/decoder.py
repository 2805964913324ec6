"""Causal language models of transformers with their KV cache as the program's state: one program for prefill and decode.

    logits = decoder(input_ids, attention_mask, position_ids, start)

input_ids: [batch, tokens], written to the cache slots start, start + 1, … attention_mask: [batch, max_length], 0 for cache
slots that hold padding; the causal mask hides slots that are not filled yet. position_ids: [batch, tokens]. start: [1], the
number of filled slots. logits: [batch, 1, vocabulary] of the last token, or [batch, tokens, vocabulary] of all.

Each layer keeps keys and values, [batch, key_heads, max_length, head_dim]; a call writes `index_copy(state, 2, slots, new)`.
Layers with a sliding window keep all slots too: their mask hides tokens outside the window.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.export import Dim

from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.device import device_of
from lissom.frontends.export import Capture, capture, check_model, evaluating
from lissom.frontends.failures import first_line
from lissom.frontends.isolation import isolated, with_own_modules
from lissom.frontends.untouched import untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids", "start")
"""The inputs of a decoder's program, in order."""
CACHE = "cache"
"""The name of the module with the state: `cache.0.keys` and `cache.0.values` belong to the first layer."""
SHORTEST = 8
"""The smallest number of slots of a KV cache."""
_PREFILL = 128
"""The most tokens of a prefill that is timed."""


def capture_decoder(
    model: nn.Module,
    *,
    max_length: int,
    batch: int = 1,
    all_logits: bool = False,
    device: torch.device | None = None,
) -> Capture:
    """The model as a program whose state is its KV cache. The model is not modified, and the program shares its weights.

    max_length: the capacity of the cache in tokens, prompt included. batch: the fixed number of sequences.
    all_logits: return the logits of every token of a call, [batch, tokens, vocabulary], not only of the last.

    Raises: UnsupportedError if the model is not a causal language model of transformers, or its state is more than keys and
        values; InputError if max_length or batch do not fit it; CaptureError naming the line that cannot be captured.
    """
    known = _check(model, max_length, batch)
    with isolated(device_of(known)):
        return _capture(cast("PreTrainedModel", with_own_modules(known)), max_length, batch, all_logits, device)


def _capture(model: PreTrainedModel, max_length: int, batch: int, all_logits: bool, device: torch.device | None) -> Capture:
    """`capture_decoder` for a model that was checked."""
    layers = _layer_caches(model)
    example = _example(model, max_length, batch)
    sequence = Dim("sequence", max=max_length)
    dynamic: dict[str, dict[int, Dim | str]] = {"input_ids": {1: sequence}, "position_ids": {1: sequence}}
    stateful = _with_state(model, layers, max_length, batch, all_logits)
    captured = capture(stateful, (), dict(zip(INPUTS, example, strict=True)), dynamic=dynamic, device=device)
    other = next((name for name in captured.program.state if not name.startswith(f"{CACHE}.")), None)
    if other is not None:
        raise UnsupportedError(
            f"{type(model).__name__} keeps '{other}' between calls besides its KV cache; generation takes models whose only "
            f"state is the KV cache"
        )
    _confirm(captured.program, model, captured.example)
    step = _step(captured.example, max_length)
    checked = (*check_samples(captured.program.signature, captured.example), step)
    notes = (*captured.notes, _describe(captured.program))
    return replace(captured, example=step, samples=checked, notes=notes, timed=(_prefill(captured.example, max_length),))


def _example(model: PreTrainedModel, max_length: int, batch: int) -> Sample:
    """Inputs that expose a wrong program: some slots filled, the first of them padding, and several new tokens."""
    tokens = max(2, min(8, (max_length - 2) // 3))
    start, padding = 2, 1
    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    device = device_of(model)
    ids = torch.randint(0, int(vocabulary), (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, max_length, dtype=torch.int64)
    mask[:, :padding] = 0
    positions = (torch.arange(tokens) + start - padding).expand(batch, tokens).contiguous()
    return [tensor.to(device) for tensor in (ids, mask, positions, torch.tensor([start]))]


def _step(example: Sample, max_length: int) -> Sample:
    """The inputs of a decode step with a half-full cache; programs are timed on them."""
    ids, mask, positions, start = example
    filled = max_length // 2
    return [ids[:, :1], mask, torch.full_like(positions[:, :1], filled - 1), torch.full_like(start, filled)]


def _prefill(example: Sample, max_length: int) -> Sample:
    """The inputs of a prefill of an empty cache; programs are timed on them too."""
    ids, mask, positions, start = example
    tokens = min(_PREFILL, max_length)
    repeated = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    counted = torch.arange(tokens, device=positions.device).expand(len(ids), tokens).contiguous()
    return [repeated, mask, counted, torch.zeros_like(start)]


def _confirm(program: Program, model: PreTrainedModel, example: Sample) -> None:
    """Compare a prefill in two parts and a decode step with the model's call on all tokens at once.

    Raises: CaptureError if they differ: some models count keys from the end of the cache, even if it is not full.
    """
    ids, mask, _, start = (tensor.cpu() for tensor in example)
    device, tokens = example[0].device, ids.shape[1]
    positions = torch.arange(mask.shape[1]).expand_as(mask) - int((mask == 0)[0].sum())
    positions = positions.clamp_min(0)
    ends = sorted({1, tokens - 1, tokens})
    found: list[object] = []
    with torch.no_grad(), kept_state(program):
        for begin, end in zip([0, *ends], ends, strict=False):
            part = [ids[:, begin:end], mask, positions[:, begin:end], torch.full_like(start, begin)]
            found = program.run([tensor.to(device) for tensor in part])
        given = {"input_ids": ids, "attention_mask": mask[:, :tokens], "position_ids": positions[:, :tokens]}
        wanted = _whole(model, {name: tensor.to(device_of(model)) for name, tensor in given.items()})
    error = relative_error(wanted[:, -1].to(device), cast(torch.Tensor, found[0])[:, -1])
    if error > tolerance_of(program):
        raise CaptureError(
            f"{type(model).__name__} with a cache of fixed size differs from {type(model).__name__} without one by {error:.2g} "
            f"relative, allowed {tolerance_of(program):.2g}; its code does not know caches that are longer than what is in them"
        )


def _describe(program: Program) -> str:
    size = sum(tensor.numel() * tensor.element_size() for tensor in map(program.weight, program.state))
    rows, _, length, _ = program.weight(program.state[0]).shape
    return f"the cache holds {length} tokens of {rows} sequence{'s' if rows > 1 else ''} in {size / 1e6:.3g} MB"


def _check(model: nn.Module, max_length: int, batch: int) -> PreTrainedModel:
    """The model, if it is a causal language model with positions for the whole cache. Raises: UnsupportedError, InputError."""
    try:
        from transformers import Cache, GenerationMixin, PreTrainedModel
    except ImportError as error:
        raise UnsupportedError("generation needs transformers: pip install 'lissom[demo]'") from error
    if not hasattr(Cache, "get_query_offset"):
        raise UnsupportedError("generation needs a transformers that has Cache.get_query_offset: pip install -U transformers")
    check_model(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{name} is not a transformers model; generation takes one, such as LlamaForCausalLM")
    if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
        kind = "is an encoder-decoder model" if model.config.is_encoder_decoder else "does not generate"
        raise UnsupportedError(f"{name} {kind}; generation takes a causal language model, such as LlamaForCausalLM")
    check_capacity(max_length, batch)
    known = longest_text(model)
    if known is not None and max_length > known:
        raise InputError(f"max_length is {max_length}, and {name} knows positions up to {known}; give {known} or less")
    switch = _longrope_switch(model)
    if switch is not None and max_length > switch:
        raise InputError(
            f"max_length is {max_length}, and {name} has other rotary frequencies in texts of more than {switch} tokens "
            f"(longrope), to which the keys in a cache cannot be turned; give {switch} or less"
        )
    return model


def _longrope_switch(model: PreTrainedModel) -> int | None:
    """The number of tokens beyond which longrope uses its long frequencies; None for other models."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [found, *(item for item in found.values() if isinstance(item, dict))]
    lengths = [item["original_max_position_embeddings"] for item in kinds if item.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def check_capacity(max_length: int, batch: int) -> None:
    """Refuse a wrong max_length or batch. Raises: InputError."""
    for word, number in (("max_length", max_length), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{word} is {number!r:.80}; give a whole number")
    if max_length < SHORTEST:
        raise InputError(f"max_length is {max_length}; give the tokens of prompt and answer together, {SHORTEST} or more")
    if batch < 1:
        raise InputError(f"batch is {batch}; give how many sequences are generated at once, 1 or more")


def longest_text(model: nn.Module) -> int | None:
    """The number of positions of a transformers model; None if its configuration gives no limit."""
    config: Any = getattr(model, "config", None)
    known = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return known if isinstance(known, int) else None


def _layer_caches(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The keys and values of one token in each layer, [1, key_heads, 1, head_dim], in a cache of transformers.

    Raises: UnsupportedError if a layer's state is anything but keys and values.
    """
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

    cache = Cache(layer_class_to_replicate=DynamicLayer)
    try:
        with untouched(model), evaluating(model), torch.no_grad():
            _call(model, cache, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device_of(model)))
    # The model's own code may raise anything for a cache class it does not know.
    except Exception as error:
        raise _unsupported_cache(model, error) from error
    layers = cast("list[DynamicLayer]", cache.layers)
    found = [(layer.keys, layer.values) for layer in layers if layer.keys is not None and layer.values is not None]
    if not found or len(found) < len(layers) or any(keys.dim() != 4 for keys, _ in found):
        raise _unsupported_cache(model)
    return found


def _whole(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits without a KV cache."""
    parameters = inspect.signature(type(model).forward).parameters
    with untouched(model), evaluating(model):
        return model(**{name: tensor for name, tensor in inputs.items() if name in parameters}, use_cache=False).logits


def _unsupported_cache(model: nn.Module, error: Exception | None = None) -> UnsupportedError:
    why = f" ({type(error).__name__}: {first_line(error)})" if error else ""
    return UnsupportedError(
        f"{type(model).__name__} cannot be run with a cache that holds keys and values of every layer{why}; "
        f"generation takes models whose layers all attend"
    )


def _call(model: nn.Module, cache: object, **inputs: object) -> Any:
    """The outputs of the model's own forward."""
    return type(model).forward(model, **inputs, cache=cache, use_cache=True)  # pyright: ignore[reportCallIssue]


def _with_state(
    model: PreTrainedModel, layers: Sequence[tuple[torch.Tensor, ...]], max_length: int, batch: int, all_logits: bool
) -> nn.Module:
    """A module with the model's submodules and weights under the same names, and the KV cache as buffers."""
    stateful = copy.copy(model)
    stateful._modules, stateful._buffers = dict(model._modules), dict(model._buffers)
    holder = nn.Module()
    for index, kept in enumerate(layers):
        layer = nn.Module()
        for name, one in zip(("keys", "values"), kept, strict=True):
            shape = (batch, one.shape[1], max_length, one.shape[3])
            layer.register_buffer(name, torch.zeros(shape, dtype=one.dtype, device=device_of(model)))
        holder.add_module(str(index), layer)
    if hasattr(model, CACHE):
        raise UnsupportedError(f"{type(model).__name__} already has an attribute '{CACHE}', which its KV cache needs")
    stateful.add_module(CACHE, holder)
    stateful.forward = _forward(stateful, holder, all_logits)
    return stateful


def _forward(stateful: PreTrainedModel, holder: nn.Module, all_logits: bool) -> Callable[..., torch.Tensor]:
    """The forward of the module with the KV cache as state."""
    from transformers import Cache

    parameters = inspect.signature(type(stateful).forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in parameters and not all_logits else {}
    layer_class = _layer_class()

    def forward(
        input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        cache = Cache(layers=[layer_class(layer, start) for layer in holder.children()])
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in given.items() if name in parameters}
        logits = _call(stateful, cache, **given, **keep).logits
        return logits if all_logits else logits[:, -1:]

    return forward


def _layer_class() -> type:
    """The class of a cache layer during tracing; in a function, so that transformers is imported only when needed."""
    from transformers.cache_utils import CacheLayerMixin

    class StateLayer(CacheLayerMixin):
        """Keys and values in buffers; the causal mask, offset by `start`, hides the slots that are not filled."""

        is_sliding = False

        def __init__(self, layer: nn.Module, start: torch.Tensor) -> None:
            super().__init__()
            self.keys = cast(torch.Tensor, layer.keys)
            self.values = cast(torch.Tensor, layer.values)
            self.start = start
            self.is_initialized = True

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            """Does nothing: the buffers exist already."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """Write the new keys and values into their slots; returns all of them."""
            assert self.keys is not None and self.values is not None
            slots = torch.arange(key_states.shape[2], device=key_states.device) + self.start
            keys = self.keys.index_copy(2, slots, key_states)
            values = self.values.index_copy(2, slots, value_states)
            self.keys.copy_(keys)
            self.values.copy_(values)
            return keys, values

        def get_mask_sizes(self, query_length: object) -> tuple[int, int]:
            return self.get_max_length(), 0

        def get_seq_length(self) -> int:
            return cast(int, self.start)

        def get_max_length(self) -> int:
            assert self.keys is not None
            return self.keys.shape[2]

    return StateLayer
