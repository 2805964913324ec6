"""The metadata of a transformers model, as an artifact holds it: its configuration, main input and modalities."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lissom.errors import ArtifactError
from lissom.frontends.capture.failures import first_line
from lissom.io.fields import take, take_list, text

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Facts:
    """The metadata of a transformers model.

    Attributes:
        configuration: as JSON.
        main_input: the name of the argument for tokens, pixels or audio.
        modalities: of its inputs.
        config_class: of the configuration; None looks it up by model type.
        source: the directory or the name on the Hub that the model came from, with its tokenizer and processors; None if it was
            made in memory.
    """

    configuration: Mapping[str, object]
    main_input: str
    modalities: tuple[str, ...]
    config_class: Any = None
    source: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Facts | None:
        """A model's metadata; None if it has no configuration and so is not a transformers model."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "to_json_string"):
            return None
        modalities = getattr(model, "input_modalities", ())
        listed = (modalities,) if isinstance(modalities, str) else tuple(modalities)
        main_input = str(getattr(model, "main_input_name", "input_ids"))
        source = str(getattr(config, "_name_or_path", "") or "") or None
        return cls(json.loads(config.to_json_string(use_diff=False)), main_input, listed, type(config), source)

    def to_json(self) -> dict[str, object]:
        return {"config": self.configuration, "main_input": self.main_input, "modalities": list(self.modalities)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Facts | None:
        """The metadata that `to_json` wrote, None for an empty mapping. Raises ArtifactError if it has another form."""
        if not data:
            return None
        try:
            return cls(take(data, "config", dict), take(data, "main_input", str), take_list(data, "modalities", text))
        except ValueError as error:
            raise ArtifactError(
                f"this Lissom cannot read the model's metadata in the artifact: {error}; save the model again"
            ) from error

    def make_config(self) -> PretrainedConfig:
        """A new configuration object of transformers.

        Raises:
            ImportError: without transformers.
            ArtifactError: if transformers refuses it.
        """
        from transformers import CONFIG_MAPPING, PretrainedConfig

        kind = str(self.configuration.get("model_type"))
        # The mapping imports a class only when it is looked up with brackets.
        known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PretrainedConfig  # noqa: SIM401
        try:
            config = (self.config_class or known).from_dict(dict(self.configuration))
            # As transformers does: pipelines look for the tokenizer and other files of the model there.
            config._name_or_path = self.source or ""
            return config
        # Configuration classes raise errors of their own for values they do not take.
        except Exception as error:
            raise ArtifactError(
                f"transformers refuses the configuration of this model of type '{kind}': {first_line(error)}"
            ) from error
