"""Keys and values in fp8: scales for servers that keep the KV cache so, and what the rounding changes.

A layer has one scale for its keys and one for its values: their largest absolute value on calibration data, divided by 448, the
largest number of e4m3. vLLM reads them as `k_scale` and `v_scale`, docs.vllm.ai, "Quantized KV Cache".
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom.compiler.ir.program import Program
from lissom.compiler.verify.divergence import tolerance_of
from lissom.errors import UnsupportedError
from lissom.export.fresh_process import error_of
from lissom.frontends.capture.kv_cache import is_kv_cache_object
from lissom.ops.formats import FP8_LARGEST

KvCache = Literal["fp8"]
_FLIPPED = 0.25
"""The most that outputs may differ from those with keys and values rounded here, as a part of what rounding changes. Both round
x / scale, and x differs in its last bits, so few values are rounded the other way, and each by one step."""
_FIELDS: Mapping[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""The scheme in the terms of compressed-tensors."""

Change = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def check_kv_cache(kv_cache: str | None) -> KvCache | None:
    """The format of that name. Raises UnsupportedError for another name."""
    known = next((known for known in get_args(KvCache) if known == kv_cache), None)
    if kv_cache is not None and known is None:
        raise UnsupportedError(f"kv_cache= is {kv_cache!r:.80}; choose {', '.join(get_args(KvCache))}")
    return known


@dataclass(frozen=True)
class CacheScales:
    """The scales of a model's keys and values.

    Attributes:
        scales: of the keys and of the values, [2], by the paths of the attention layers.
        rounded: the model's outputs on the example with keys and values rounded.
    """

    scales: Mapping[str, torch.Tensor]
    rounded: Sequence[torch.Tensor]


def measure(model: Any, batches: Sequence[Mapping[str, Any]], example: Mapping[str, Any]) -> CacheScales:
    """Measure the scales, and round with them.

    Args:
        batches: the arguments of the model's calls.
        example: those of the call whose outputs are returned.

    Raises:
        UnsupportedError: if the model has no KV cache, or keys or values that are not finite.
    """
    largest: dict[int, torch.Tensor] = {}

    def watch(layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        here = torch.stack([part.abs().amax().float() for part in (keys, values)])
        largest[layer] = torch.maximum(largest[layer], here) if layer in largest else here
        return keys, values

    if _argument(model) is None:
        raise UnsupportedError(f"kv_cache= is for decoders of transformers, and {type(model).__name__} takes no KV cache")
    for batch in batches:
        _outputs(model, batch, watch)
    paths = _attentions(model, [*largest])
    # Those that are all zeros are exact with any scale.
    scales = {layer: torch.where(found > 0, found / FP8_LARGEST, 1.0) for layer, found in largest.items()}
    wrong = next((paths[layer] for layer, found in scales.items() if not bool(found.isfinite().all())), None)
    if wrong is not None:
        raise UnsupportedError(f"'{wrong}' has keys or values that are not finite, and so no scales; leave kv_cache= out")

    def rounded(layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key_scale, value_scale = scales[layer].to(keys.dtype)
        return _round(keys, key_scale), _round(values, value_scale)

    return CacheScales({paths[layer]: found for layer, found in scales.items()}, _outputs(model, example, rounded))


def _argument(model: Any) -> str | None:
    """The name of the model's argument for a KV cache, which was another before transformers 5.24."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), None)


def _attentions(model: nn.Module, layers: Sequence[int]) -> dict[int, str]:
    """The path of the attention of each of these layers of the cache. Raises UnsupportedError if there is not one."""
    paths: dict[int, str] = {}
    for layer in layers:
        found = [
            path
            for path, module in model.named_modules()
            if getattr(module, "layer_idx", None) == layer and "attention" in type(module).__name__.lower()
        ]
        if len(found) != 1:
            raise UnsupportedError(
                f"{type(model).__name__} has {len(found)} modules of attention for layer {layer} of its cache, and kv_cache= "
                f"writes the scales of one"
            )
        paths[layer] = found[0]
    return paths


def describe_rounding(
    program: Program, found: CacheScales, outputs: Sequence[torch.Tensor] | None, unrounded: Sequence[torch.Tensor]
) -> str:
    """Compare a library's outputs with those that are rounded here; returns a note on what rounding changes.

    Args:
        program: that was exported, for the error and the tolerance of its dtype.
        outputs: of the library, with keys and values rounded; None if it does not round them.
        unrounded: of the library, with none rounded.

    Raises:
        UnsupportedError: if they differ by more than few values that are rounded the other way.
    """
    effect = error_of(found.rounded, unrounded)
    changes = f"keys and values in fp8 change the outputs by {effect:.1e} relative on the example inputs"
    if outputs is None:
        versions = " with ".join(f"{library} {version(library)}" for library in ("compressed-tensors", "transformers"))
        return f"{changes}, computed here: {versions} does not round them"
    error = error_of(outputs, found.rounded)
    if not error <= _FLIPPED * effect + tolerance_of(program):
        raise UnsupportedError(
            f"transformers rounds the keys and values of {program.name} otherwise: its outputs differ by {error:.2g} relative, "
            f"and rounding changes them by {effect:.2g}; leave kv_cache= out"
        )
    return f"{changes}; those of transformers differ by {error:.1e}"


def write_scheme(folder: Path) -> None:
    """Add the scheme of keys and values to the configuration of a checkpoint."""
    file, quantization = folder / "config.json", importlib.import_module("compressed_tensors.quantization")
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"]["kv_cache_scheme"] = quantization.QuantizationArgs(**_FIELDS).model_dump(mode="json")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _round(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round to e4m3, in the dtype of x, as compressed-tensors does."""
    return (x / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale


def _outputs(model: Any, arguments: Mapping[str, Any], change: Change) -> list[torch.Tensor]:
    """The outputs of a model whose keys and values are changed on their way to the cache."""
    transformers: Any = importlib.import_module("transformers")

    class Changed(transformers.DynamicCache):
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
            return super().update(*change(layer, keys, values), layer, *args, **kwargs)

    given = {**arguments, str(_argument(model)): Changed(config=model.config), "use_cache": True}
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**given), is_leaf=is_kv_cache_object)
    return [leaf.cpu().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
