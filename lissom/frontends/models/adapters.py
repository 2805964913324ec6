"""Adapters of PEFT, such as LoRA, merged into the weights of a copy before a model is captured."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from lissom.errors import UnsupportedError
from lissom.frontends.capture.failures import first_line
from lissom.frontends.capture.isolation import with_own_modules

_ADVICE = "merge it yourself, model = model.merge_and_unload(), or compile the model without it"


def with_merged_adapters(model: nn.Module) -> nn.Module:
    """The model with the active adapters merged into its weights; the model itself if it has none.

    The caller's model is not modified: the result has copies of the weights that adapters change, and shares all others.

    Raises:
        UnsupportedError: for an adapter that is no change of weights, such as prompt tuning.
    """
    tuners, kind = sys.modules.get("peft.tuners.tuners_utils"), getattr(sys.modules.get("peft"), "PeftModel", ())
    if tuners is None or not isinstance(model, nn.Module):
        return model
    layers = [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
    if not layers and not isinstance(model, kind):
        return model
    name = type(model).__name__
    adapter: Any = getattr(model, "active_peft_config", None) if isinstance(model, kind) else None
    if getattr(adapter, "is_prompt_learning", False):
        raise UnsupportedError(
            f"{name} has an adapter of the kind {adapter.peft_type.value}, which is no change of weights; compile the model "
            f"without it"
        )
    copied: Any = with_own_modules(model)
    if copied is model:
        raise UnsupportedError(f"{name} has an adapter and cannot be copied, so that merging would change it; {_ADVICE}")
    for layer in layers:
        base = copied.get_submodule(layer).get_base_layer()
        for weight, parameter in list(base.named_parameters(recurse=False)):
            setattr(base, weight, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
    try:
        return copied.merge_and_unload() if isinstance(model, kind) else _merged(copied, layers)
    # Each kind of adapter raises errors of its own.
    except Exception as error:
        raise UnsupportedError(f"the adapter of {name} cannot be merged: {first_line(error)}; {_ADVICE}") from error


def _merged(model: nn.Module, layers: list[str]) -> nn.Module:
    """The model of transformers' own `load_adapter` with its adapters merged, and their layers replaced by the plain ones."""
    for name in layers:
        layer: Any = model.get_submodule(name)
        if layer.disable_adapters:
            layer.unmerge()
        elif not layer.merged:
            layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    return model
