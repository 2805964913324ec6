"""`generate` of transformers for compiled decoders."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

from transformers import GenerationConfig, GenerationMixin


class CompiledGeneration(GenerationMixin):
    """`generate` over a decoder that is compiled already, so that transformers compiles and prepares nothing."""

    main_input_name: str = "input_ids"
    _is_stateful: ClassVar[bool] = False

    @property
    def name_or_path(self) -> str:
        """The name or path of the original model."""
        return str(cast(Any, self).config.name_or_path)

    def can_generate(self) -> bool:
        return True

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        return False

    @contextmanager
    def _optimize_model_for_decode(self) -> Generator[None]:
        yield

    def is_remote_code(self) -> bool:
        return False
