"""Compares what llama.cpp computes from a written file with PyTorch's result for the same weights.

ggml rounds the inputs of products to the precision of the weights: to float16 or bfloat16, or to int8 with a scale for each
block. GELU it looks up in a table of float16 numbers. The difference is judged by what the same roundings change in PyTorch.
https://github.com/ggml-org/ggml, src/ggml-cpu: type_traits_cpu (vec_dot_type), ggml_table_gelu_f16
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lissom.compiler.verify.divergence import TOLERANCE
from lissom.errors import UnsupportedError
from lissom.export.gguf.families import Family
from lissom.export.gguf.projections import FUSED
from lissom.export.gguf.reload import PACKAGE, Request, log_probabilities
from lissom.frontends.capture.kv_cache import without_kv_cache
from lissom.frontends.generation.decoder import longrope_switch
from lissom.ops.gguf_blocks import BLOCK_TYPES

_READ, _ASKED = 24, 8
"""The tokens of the text that are read, and those whose log probabilities are compared."""
_CONTEXT = 256
"""The fewest tokens that llama.cpp has room for, whatever it is asked for."""
_ROUNDINGS = 2.0
"""Two libraries that round as finely, but add in other orders, round some values the other way: each is this far from the exact
result, so they are up to twice as far from each other."""
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Compared:
    """The comparison. difference: the largest of the log probabilities; None if there was none."""

    difference: float | None
    note: str


def compare(
    name: str, file: Path, make: Callable[[], tuple[Any, Mapping[str, str]]], family: Family, ids: Sequence[int]
) -> Compared:
    """Compare llama.cpp's log probabilities of a text with those of the model.

    Args:
        name: of the program, for errors.
        make: gives the model with the weights of the file, and their types in it by the names of Llama.
        ids: of the tokens for the text, which is drawn at random.

    Raises:
        UnsupportedError: if llama.cpp does not run the file, or computes something else.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        return Compared(None, "not compared: llama.cpp, which is not installed, pip install 'lissom[llama-cpp]'")
    model, kinds = make()
    switch = longrope_switch(model)
    if not ids or (switch is not None and switch < _CONTEXT):
        why = "no token of ASCII characters" if not ids else f"other frequencies from {switch} tokens on"
        return Compared(None, f"not compared: llama.cpp, because the model has {why}")
    text = torch.tensor(ids)[torch.randint(0, len(ids), (_READ + _ASKED,), generator=torch.Generator().manual_seed(0))]
    told = torch.tensor(log_probabilities(name, Request(str(file), text.tolist(), _READ)))
    wanted = _log_probabilities(model, text)
    with ExitStack() as stack:
        _round_as_ggml(stack, model, kinds, family)
        rounding = float((_log_probabilities(model, text) - wanted).abs().max())
    difference = float((told - wanted.gather(1, text[_READ:, None])[:, 0]).abs().max())
    # The least of them is about as large as the largest difference of logits, whose last bits are added in other orders.
    allowed = _ROUNDINGS * rounding + TOLERANCE[torch.float32] * float(wanted.abs().max())
    if not difference <= allowed:
        raise UnsupportedError(
            f"llama.cpp gives log probabilities for the file of {name} that differ by {difference:.2g}, allowed {allowed:.2g}, "
            f"so it is not written"
        )
    rounds = f", where its rounding of activations changes them by up to {rounding:.1e}" if rounding else ""
    return Compared(difference, f"log probabilities of {_ASKED} tokens in llama.cpp within {difference:.1e}{rounds}")


def _log_probabilities(model: Any, text: torch.Tensor) -> torch.Tensor:
    """Those of all tokens at each place that llama.cpp is asked for, [asked, vocabulary]."""
    with torch.no_grad(), without_kv_cache(model):
        return model(input_ids=text[None]).logits[0, _READ - 1 : -1].float().log_softmax(-1)


def _round_as_ggml(stack: ExitStack, model: nn.Module, kinds: Mapping[str, str], family: Family) -> None:
    """Round the inputs of products, and those and the outputs of GELU, until the stack is closed."""
    for path, module in model.named_modules():
        round_input = _rounding(_kind_of(f"{path}.weight", kinds, family))
        if "gelu" in type(module).__name__.lower():
            round_input = _to_half
            stack.callback(module.register_forward_hook(_with_half_output).remove)
        if round_input is not None and not isinstance(module, nn.Embedding):
            stack.callback(module.register_forward_pre_hook(partial(_with_rounded_input, round_input)).remove)


def _kind_of(name: str, kinds: Mapping[str, str], family: Family) -> str:
    """The type of a weight of the model, which may be several of Llama's."""
    renamed = family.renamed(name)
    for fused, parts in FUSED.items():
        renamed = renamed.replace(f".{fused}.", f".{parts[0]}.")
    tied = "model.embed_tokens.weight" if renamed == "lm_head.weight" else renamed
    return kinds.get(renamed) or kinds.get(tied, "F32")


def _rounding(kind: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """How ggml rounds the inputs of products with weights of this type; None where it does not."""
    if kind in _DTYPES:
        return lambda x: x.to(_DTYPES[kind]).to(x.dtype)
    return partial(_to_int8, BLOCK_TYPES[kind].size) if kind in BLOCK_TYPES else None


def _to_int8(size: int, x: torch.Tensor) -> torch.Tensor:
    """int8 with a scale for every so many neighbours."""
    blocks = x.unflatten(-1, (-1, size))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return ((blocks / scale).round() * scale).flatten(-2)


def _to_half(x: torch.Tensor) -> torch.Tensor:
    return x.half().to(x.dtype)


def _with_rounded_input(
    round_input: Callable[[torch.Tensor], torch.Tensor], _: nn.Module, given: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    return (round_input(given[0]), *given[1:])


def _with_half_output(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
    return _to_half(output)
