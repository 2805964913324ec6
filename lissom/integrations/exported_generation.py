"""`generate` of transformers on the programs that `LissomExporter.export_for_generation` made."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import Cache, GenerationConfig, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters.base import ExportedModel

from lissom.errors import InputError, UnsupportedError
from lissom.integrations.exporters import FORMAT, LissomRunner
from lissom.runtime.generating import CompiledGeneration

PREFILL, DECODE = "prefill", "decode"


class ExportedGenerator(nn.Module, CompiledGeneration):
    """An exported decoder with the `generate` of transformers: prompts run on one program, further tokens on another.

    exported: the export of a causal language model, with a cache that grows, or one loaded by `ExportedModel.from_pretrained`.

    Raises: UnsupportedError for another export.

    >>> from lissom.integrations.exported_generation import ExportedGenerator
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

        Raises: InputError for padding where the model was exported without.
        """
        cached = 0 if cache is None else cache.get_seq_length()
        runner = self.runners[DECODE if cached else PREFILL]
        taken = runner.metadata.kwargs
        if attention_mask is not None and "attention_mask" not in taken and not attention_mask.all():
            raise InputError("the prompts have padding, and the model was exported without; export it with a padded example")
        if attention_mask is None and "attention_mask" in taken:
            attention_mask = input_ids.new_ones(len(input_ids), cached + input_ids.shape[1])
        given: dict[str, Any] = {
            **others,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cache": cache,
        }
        outputs = runner(**{name: value for name, value in given.items() if name in taken})
        for layer in getattr(outputs.get("cache"), "layers", ()):
            # The programs keep and return all tokens of such a layer, which counts them by itself where it runs.
            if type(layer) is DynamicSlidingWindowLayer:
                layer.__class__ = DynamicLayer  # pyright: ignore[reportAttributeAccessIssue]
        return outputs
