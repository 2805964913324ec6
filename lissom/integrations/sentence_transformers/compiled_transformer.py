"""The module of Sentence Transformers that runs a compiled program, and its files.

Importing this file, as `import lissom` does once Sentence Transformers is imported, makes `SentenceTransformer(directory)` find
the class of a saved model without `trust_remote_code=True`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from torch import nn
from transformers import PretrainedConfig

from lissom.artifacts.model_files import check_tokenizer
from lissom.artifacts.packed import load_linked
from lissom.errors import ArtifactError, InputError
from lissom.integrations.sentence_transformers.fused_modules import Constant, Features, split_features
from lissom.io.fields import number, take, take_list, text
from lissom.runtime.compiled_model import CompiledModel, load

FOLDER = "lissom"
"""The folder of the artifact in the directory of a saved model."""
_LOADING = {"subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code"}
"""The `model_kwargs` that Sentence Transformers itself adds."""
_OURS = {"trusted_keys", "allow_native", "map_weights"}
"""The `model_kwargs` that `lissom.load` takes."""


class CompiledTransformer(Transformer):
    """A transformer and the modules after it, compiled as one program.

    It stands in the place of a model's `Transformer`: it tokenizes texts as that one did, and its features hold what the
    fused modules returned.
    """

    fused: list[str]
    constants: dict[str, Constant]
    dimension: int | None

    @classmethod
    def of(
        cls,
        module: Transformer,
        model: nn.Module,
        fused: list[str],
        constants: Mapping[str, Constant],
        dimension: int | None,
    ) -> Self:
        """The module with the compiled model in place of its transformer.

        Args:
            fused: the class names of the modules in the program.
            constants: features fixed in it.
            dimension: of the embeddings.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        kept = {name: value for name, value in vars(module).items() if name not in vars(made)}
        # A change of the maximum length must not reach the original's tokenizer.
        vars(made).update(kept, processor=copy.deepcopy(module.processor))
        made.can_flatten_inputs = False
        made.model = model
        made.fused, made.constants, made.dimension = fused, dict(constants), dimension
        return made.eval()

    def __init__(self, model_name_or_path: str, *, lissom: Mapping[str, Any] | None = None, **options: Any) -> None:
        """Reads a saved model; called by `load`.

        Args:
            lissom: the fields that `get_config_dict` adds.
        """
        super().__init__(model_name_or_path, **options)
        self.can_flatten_inputs = False
        fields = dict[str, Any]() if lissom is None else lissom
        try:
            self.fused = list(take_list(fields, "modules", text))
            self.constants = take(fields, "constants", dict)
            dimension = take(fields, "dimension", object)
            self.dimension = None if dimension is None else number(dimension)
        except ValueError as error:
            raise ArtifactError(
                f"'{model_name_or_path}' cannot be read: in {self.config_file_name}, {error}; save the model again"
            ) from error
        check_tokenizer(self._compiled.program, "input_ids", self.tokenizer)

    def _load_model(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_name_or_path: str,
        transformer_task: str,
        config: PretrainedConfig,
        backend: str,
        is_peft_model: bool,
        **model_kwargs: Any,
    ) -> CompiledModel:
        """The compiled model in the directory, instead of one of transformers.

        Raises:
            ArtifactError: if there is none.
            InputError: for options of a model that is not compiled.
        """
        unknown = sorted(model_kwargs.keys() - _LOADING - _OURS)
        if unknown or backend != "torch":
            what = f"model_kwargs '{unknown[0]}'" if unknown else f"backend '{backend}'"
            raise InputError(f"'{model_name_or_path}' is compiled, and takes no {what}; leave it out")
        subfolder = str(model_kwargs.get("subfolder") or "")
        folder = self.load_dir_path(
            model_name_or_path,
            subfolder=f"{subfolder}/{FOLDER}" if subfolder else FOLDER,
            token=model_kwargs.get("token"),
            cache_folder=model_kwargs.get("cache_dir"),
            revision=model_kwargs.get("revision"),
            local_files_only=bool(model_kwargs.get("local_files_only")),
        )
        if folder is None or not Path(folder).is_dir():
            raise ArtifactError(f"'{model_name_or_path}' has no folder '{FOLDER}' with a compiled model; save the model again")
        return load_linked(Path(folder), partial(load, **{name: model_kwargs[name] for name in _OURS & model_kwargs.keys()}))

    @property
    def _compiled(self) -> CompiledModel:
        model: Any = self.model
        return model

    def forward(self, features: Features, **kwargs: object) -> dict[str, Any]:
        """The features, and what the compiled modules add to them.

        Raises:
            InputError: for other features than the model was compiled with.
        """
        tensors, constants = split_features(features)
        program = self._compiled.program
        wanted = [argument.name for argument in program.signature.keyword]
        changed = next((name for name, value in self.constants.items() if constants.get(name, value) != value), None)
        if changed is not None:
            raise InputError(
                f"the model was compiled for {changed}={self.constants[changed]!r}, and the input has {constants[changed]!r}; "
                f"use the original model for it"
            )
        if set(tensors) != set(wanted):
            raise InputError(
                f"the model was compiled for the features {', '.join(wanted)}, and the input has "
                f"{', '.join(tensors) or 'none'}; use the original model for it"
            )
        return {**features, **self.model(**tensors)}

    def get_embedding_dimension(self) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.dimension

    def get_config_dict(self) -> dict[str, Any]:
        fields = {"modules": self.fused, "constants": self.constants, "dimension": self.dimension}
        return {**super().get_config_dict(), "lissom": fields}

    def save(self, output_path: str, *args: object, safe_serialization: bool = True, **kwargs: object) -> None:
        """Write configuration, tokenizer, and the artifact in the folder `lissom`; none of it is pickled.

        Raises:
            ArtifactError: as `CompiledModel.save`.
            UnsupportedError: likewise.
        """
        model = self._compiled
        model.save(Path(output_path) / FOLDER)
        model.config.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    def __repr__(self) -> str:
        return f"CompiledTransformer({' + '.join(self.fused)}, {self.model!r})"


def register() -> None:
    """Let Sentence Transformers find the class by the name that saved models have."""
    name = f"{CompiledTransformer.__module__}.{CompiledTransformer.__qualname__}"
    BaseModel._module_classes = {**BaseModel._module_classes, name: CompiledTransformer}


register()
