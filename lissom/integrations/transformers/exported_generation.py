"""`generate` of transformers on the programs that `LissomExporter.export_for_generation` made."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin
from transformers.exporters.base import ExportedModel

from lissom.compiler.ir.signature import TensorArgument
from lissom.errors import InputError, UnsupportedError
from lissom.integrations.transformers.exporters import FORMAT, LissomRunner
from lissom.runtime.generating import CompiledGeneration

PREFILL, DECODE = "prefill", "decode"


class ExportedGenerator(nn.Module, CompiledGeneration):
    """An exported decoder with the `generate` of transformers: prompts run on one program, further tokens on another.

    Args:
        exported: the export of a causal language model, with a cache that grows, or one loaded by
            `ExportedModel.from_pretrained`.

    Raises:
        UnsupportedError: for another export.

    Examples:
        >>> from lissom.integrations.transformers.exported_generation import ExportedGenerator
        >>> ExportedGenerator(ExportedModel.from_pretrained("exported")).generate(ids, max_new_tokens=20)  # doctest: +SKIP
    """

    def __init__(self, exported: ExportedModel) -> None:
        super().__init__()
        if exported.export_format != FORMAT or {PREFILL, DECODE} - exported.components.keys():
            raise UnsupportedError(
                f"the export has the components {', '.join(exported.components)} of format '{exported.export_format}'; "
                f"generate needs '{PREFILL}' and '{DECODE}' from LissomExporter().export_for_generation(model, inputs, config)"
            )
        if exported.config is None or exported.config.is_encoder_decoder:
            raise UnsupportedError("generate on an export needs a causal language model; for others call the components")
        self.runners = cast("dict[str, LissomRunner]", exported.runners)
        self._masked = {name for name, runner in self.runners.items() if _reads_mask(runner)}
        self.config: PretrainedConfig = exported.config
        self.generation_config = exported.generation_config or GenerationConfig.from_model_config(exported.config)

    @property
    def device(self) -> torch.device:
        return self.runners[PREFILL].device

    @property
    def dtype(self) -> torch.dtype:
        return self.runners[PREFILL].dtype

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        **others: object,
    ) -> Any:
        """The outputs of the program for a prompt, or of that for the next token.

        Raises:
            InputError: for padding where the model was exported without.
        """
        stage = DECODE if _is_filled(cache) else PREFILL
        runner, masked = self.runners[stage], stage in self._masked
        parameters = runner.metadata.kwargs
        # The state of a recurrence holds no padding: its next tokens have no mask.
        if attention_mask is not None and not masked and stage == PREFILL and not attention_mask.all():
            raise InputError("the prompts have padding, and the model was exported without; export it with a padded example")
        if not masked:
            attention_mask = None
        elif attention_mask is None:
            cached = cache.get_seq_length() if cache is not None and stage == DECODE else 0
            attention_mask = input_ids.new_ones(len(input_ids), cached + input_ids.shape[1])
        given: dict[str, Any] = {
            **others,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
        }
        outputs = runner(**{name: value for name, value in given.items() if name in parameters})
        for layer in getattr(outputs.get("cache"), "layers", ()):
            # The programs keep and return all tokens of such a layer, which counts them by itself where it runs.
            if type(layer) is DynamicSlidingWindowLayer:
                layer.__class__ = DynamicLayer  # pyright: ignore[reportAttributeAccessIssue]
        return outputs


def _reads_mask(runner: LissomRunner) -> bool:
    """True if a program reads a padding mask, and was not exported with None in place of it."""
    arguments = {argument.name: argument.leaves for argument in runner.model.program.signature.keyword}
    return any(isinstance(leaf, TensorArgument) for leaf in arguments.get("attention_mask", ()))


def _is_filled(cache: Cache | None) -> bool:
    """True if a layer of the cache has read tokens: those of a recurrence count none."""
    layers = () if cache is None else cache.layers
    return any(
        any(layer.has_previous_state.values())
        if isinstance(layer, LinearAttentionCacheLayerMixin)
        else isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0
        for layer in layers
    )
