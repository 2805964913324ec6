"""Causal language models of transformers with their key/value cache as the program's state: one program for prompt and tokens.

    logits = decoder(input_ids, attention_mask, position_ids, start)

input_ids: [batch, tokens], which go to the places start, start + 1, … of the cache. attention_mask: [batch, max_length], 0 at
places of the cache that hold padding; places that are not filled yet are hidden by causality alone. position_ids:
[batch, tokens]. start: [1], how many places are filled. logits: [batch, 1, vocabulary], those behind the last token, or of all.

Each layer keeps keys and values, [batch, key_heads, max_length, head_dim]; a call writes `index_copy(state, 2, places, new)`.
Layers with a sliding window keep all places too: their mask hides what has left the window.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.export import Dim

from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.export import Capture, capture, check_model, evaluating
from lissom.frontends.isolation import isolated, with_own_modules
from lissom.frontends.untouched import untouched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS = ("input_ids", "attention_mask", "position_ids", "start")
"""The inputs of a decoder's program, in order."""
CACHE = "cache"
"""The module that holds the state: `cache.0.keys` and `cache.0.values` of the first layer, and so on."""
SHORTEST = 8
"""The fewest places a cache may have."""


@dataclass(frozen=True)
class Places:
    """What one layer keeps: keys of [batch, key_heads, max_length, head_dim] and values that may be of another size."""

    key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype


def capture_decoder(
    model: nn.Module,
    *,
    max_length: int,
    batch: int = 1,
    all_logits: bool = False,
    device: torch.device | None = None,
) -> Capture:
    """The model as a program whose state is its cache. The model is left as it was, and the program shares its weights.

    max_length: how many tokens the cache holds, those of the prompt included. batch: how many sequences, always.
    all_logits: give the logits of every token of a call, [batch, tokens, vocabulary], not of the last alone.

    Raises: UnsupportedError when it is no causal language model of transformers, or keeps more than keys and values;
        InputError when max_length or batch do not fit it; CaptureError naming the line that cannot be captured.
    """
    known = _check(model, max_length, batch)
    with isolated(_device_of(known)):
        return _capture(cast("PreTrainedModel", with_own_modules(known)), max_length, batch, all_logits, device)


def _capture(model: PreTrainedModel, max_length: int, batch: int, all_logits: bool, device: torch.device | None) -> Capture:
    """What `capture_decoder` gives, for a model that is known to be one it takes."""
    places = _places(model)
    example = _example(model, max_length, batch)
    sequence = Dim("sequence", max=max_length)
    dynamic: dict[str, dict[int, Dim | str]] = {"input_ids": {1: sequence}, "position_ids": {1: sequence}}
    stateful = _with_state(model, places, max_length, batch, all_logits)
    captured = capture(stateful, (), dict(zip(INPUTS, example, strict=True)), dynamic=dynamic, device=device)
    other = next((name for name in captured.program.state if not name.startswith(f"{CACHE}.")), None)
    if other is not None:
        raise UnsupportedError(
            f"{type(model).__name__} keeps '{other}' from call to call beside its keys and values; generation takes models "
            f"that keep these alone"
        )
    _confirm(captured.program, model, captured.example)
    step = _step(captured.example, max_length)
    checked = (*check_samples(captured.program.signature, captured.example), step)
    notes = (*captured.notes, _describe(captured.program))
    return replace(captured, example=step, samples=checked, notes=notes)


def _example(model: PreTrainedModel, max_length: int, batch: int) -> Sample:
    """Inputs that a wrong program would show itself on: some places filled, the first of them padding, several new tokens."""
    tokens = max(2, min(8, (max_length - 2) // 3))
    start, padding = 2, 1
    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    device = _device_of(model)
    ids = torch.randint(0, int(vocabulary), (batch, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, max_length, dtype=torch.int64)
    mask[:, :padding] = 0
    positions = (torch.arange(tokens) + start - padding).expand(batch, tokens).contiguous()
    return [tensor.to(device) for tensor in (ids, mask, positions, torch.tensor([start]))]


def _step(example: Sample, max_length: int) -> Sample:
    """One token for a cache that is half full: what generation mostly does, and what programs are timed on."""
    ids, mask, positions, start = example
    filled = max_length // 2
    return [ids[:, :1], mask, torch.full_like(positions[:, :1], filled - 1), torch.full_like(start, filled)]


def _confirm(program: Program, model: PreTrainedModel, example: Sample) -> None:
    """Check a prompt in two parts, and a token behind it, against the model reading it all at once.

    Raises: CaptureError when they differ: some models count keys from the end of the cache, filled or not.
    """
    ids, mask, _, start = (tensor.cpu() for tensor in example)
    device, tokens = example[0].device, ids.shape[1]
    places = torch.arange(mask.shape[1]).expand_as(mask) - int((mask == 0)[0].sum())
    places = places.clamp_min(0)
    ends = sorted({1, tokens - 1, tokens})
    found: list[object] = []
    with torch.no_grad(), kept_state(program):
        for begin, end in zip([0, *ends], ends, strict=False):
            part = [ids[:, begin:end], mask, places[:, begin:end], torch.full_like(start, begin)]
            found = program.run([tensor.to(device) for tensor in part])
        given = {"input_ids": ids, "attention_mask": mask[:, :tokens], "position_ids": places[:, :tokens]}
        wanted = _whole(model, {name: tensor.to(_device_of(model)) for name, tensor in given.items()})
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
    """The model, when it is a causal language model whose positions go as far as the cache.

    Raises: UnsupportedError, InputError.
    """
    try:
        from transformers import Cache, GenerationMixin, PreTrainedModel
    except ImportError as error:
        raise UnsupportedError("generation needs transformers: pip install 'lissom[demo]'") from error
    if not hasattr(Cache, "get_query_offset"):
        raise UnsupportedError("generation needs a transformers that has Cache.get_query_offset: pip install -U transformers")
    check_model(model)
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{name} is no model of transformers; generation takes one, such as LlamaForCausalLM")
    if not isinstance(model, GenerationMixin) or model.config.is_encoder_decoder:
        kind = "reads with an encoder" if model.config.is_encoder_decoder else "does not generate"
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
    """From how many tokens on a model with longrope takes its long frequencies; None for any other model."""
    found = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [found, *(item for item in found.values() if isinstance(item, dict))]
    lengths = [item["original_max_position_embeddings"] for item in kinds if item.get("rope_type") == "longrope"]
    return min(lengths, default=None)


def check_capacity(max_length: int, batch: int) -> None:
    """Refuse a cache of no size. Raises: InputError."""
    for word, number in (("max_length", max_length), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"{word} is {number!r:.80}; give a whole number")
    if max_length < SHORTEST:
        raise InputError(f"max_length is {max_length}; give the tokens of prompt and answer together, {SHORTEST} or more")
    if batch < 1:
        raise InputError(f"batch is {batch}; give how many sequences are generated at once, 1 or more")


def longest_text(model: nn.Module) -> int | None:
    """How many positions a model of transformers knows; None where it tells of no limit."""
    config: Any = getattr(model, "config", None)
    known = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return known if isinstance(known, int) else None


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _places(model: PreTrainedModel) -> list[Places]:
    """What each layer keeps, found by letting the model fill a cache of its own with one token.

    Raises: UnsupportedError when a layer keeps something else.
    """
    from transformers import Cache
    from transformers.cache_utils import DynamicLayer

    cache = Cache(layer_class_to_replicate=DynamicLayer)
    try:
        with untouched(model), evaluating(model), torch.no_grad():
            _call(model, cache, input_ids=torch.zeros(1, 1, dtype=torch.int64, device=_device_of(model)))
    # The model's own code may raise anything when it meets a cache it does not know.
    except Exception as error:
        raise _keeps_more(model, error) from error
    found = [(layer.keys, layer.values) for layer in cast("list[DynamicLayer]", cache.layers)]
    if not found or any(keys is None or values is None or keys.dim() != 4 for keys, values in found):
        raise _keeps_more(model)
    return [
        Places(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]), keys.dtype)
        for keys, values in found
        if keys is not None and values is not None
    ]


def _whole(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's logits without any cache."""
    parameters = inspect.signature(type(model).forward).parameters
    with untouched(model), evaluating(model):
        return model(**{name: tensor for name, tensor in inputs.items() if name in parameters}, use_cache=False).logits


def _keeps_more(model: nn.Module, error: Exception | None = None) -> UnsupportedError:
    why = f" ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})" if error else ""
    return UnsupportedError(
        f"{type(model).__name__} cannot be run with a cache that holds keys and values of every layer{why}; "
        f"generation takes models whose layers all attend"
    )


def _call(model: nn.Module, cache: object, **inputs: object) -> Any:
    """What the model's own forward gives."""
    return type(model).forward(model, **inputs, cache=cache, use_cache=True)  # pyright: ignore[reportCallIssue]


def _with_state(model: PreTrainedModel, places: Sequence[Places], max_length: int, batch: int, all_logits: bool) -> nn.Module:
    """A module that has the model's submodules and weights under their own names, and beside them the cache as buffers."""
    stateful = copy.copy(model)
    stateful._modules, stateful._buffers = dict(model._modules), dict(model._buffers)
    holder = nn.Module()
    for index, kept in enumerate(places):
        layer = nn.Module()
        for name, width in (("keys", kept.head_dim), ("values", kept.value_dim)):
            shape = (batch, kept.key_heads, max_length, width)
            layer.register_buffer(name, torch.zeros(shape, dtype=kept.dtype, device=_device_of(model)))
        holder.add_module(str(index), layer)
    if hasattr(model, CACHE):
        raise UnsupportedError(f"{type(model).__name__} has an attribute '{CACHE}' already, where its cache is to be kept")
    stateful.add_module(CACHE, holder)
    stateful.forward = _forward(stateful, holder, all_logits)
    return stateful


def _forward(stateful: PreTrainedModel, holder: nn.Module, all_logits: bool) -> Callable[..., torch.Tensor]:
    """The forward of the module with state."""
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
    """The class of one layer of the cache while a model is traced; transformers is only imported when it is needed."""
    from transformers.cache_utils import CacheLayerMixin

    class StateLayer(CacheLayerMixin):
        """Keys and values in buffers; places behind those filled are hidden by the mask, which starts at `start`."""

        is_sliding = False

        def __init__(self, layer: nn.Module, start: torch.Tensor) -> None:
            super().__init__()
            self.keys = cast(torch.Tensor, layer.keys)
            self.values = cast(torch.Tensor, layer.values)
            self.start = start
            self.is_initialized = True

        def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
            """Nothing: the buffers are there."""

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
        ) -> tuple[torch.Tensor, torch.Tensor]:
            """All keys and values, the new ones in their places."""
            assert self.keys is not None and self.values is not None
            places = torch.arange(key_states.shape[2], device=key_states.device) + self.start
            keys = self.keys.index_copy(2, places, key_states)
            values = self.values.index_copy(2, places, value_states)
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
