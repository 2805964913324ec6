"""Saved models for transformers' Auto classes and pipelines: `AutoModelForSequenceClassification.from_pretrained("out/")`.

The configuration of a saved model has the model type `lissom`, which is registered with `AutoConfig` and with every Auto class
of models. Nothing is unpickled, and no code of the folder is run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import PretrainedConfig

from lissom.artifacts.directory import is_artifact
from lissom.artifacts.manifest import MODEL_TYPE, NAME
from lissom.artifacts.packed import copy_linked
from lissom.artifacts.signature import TrustedKeys
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.capture.failures import first_line
from lissom.io.files import check_path, reason

if TYPE_CHECKING:
    import torch

    from lissom.runtime.hosted_model import FixedModule


_OTHER_MODELS = ("subfolder", "quantization_config", "gguf_file", "state_dict")
"""The options of transformers that ask for another model than the saved one."""
_LOADING = ("trusted_keys", "allow_native", "map_weights")
"""The options of `lissom.load` that say how far a saved model is trusted."""


class LissomConfig(PretrainedConfig):
    """The configuration in the folder of a saved model: the fields of the original, under the model type `lissom`."""

    model_type = MODEL_TYPE

    def __post_init__(self, **others: object) -> None:
        super().__post_init__(**others)
        # `transformers serve` looks this name up in transformers and loads the model with it.
        if any(name.endswith("ForCausalLM") for name in self.architectures or ()):
            self.architectures = ["AutoModelForCausalLM"]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """The configuration; with `return_unused_kwargs` also the options that are not its fields.

        transformers gives an option that the configuration has as a field to the configuration, and not to the model. The
        options of `lissom.load` always go to the model, so that no `config.json` can take them away.
        """
        ours = {name: options.pop(name) for name in _LOADING if name in options}
        config: Any = super().from_dict(config_dict, **options)
        return (config[0], config[1] | ours) if options.get("return_unused_kwargs") else config


class SavedModel:
    """Loads saved models for one Auto class.

    Attributes:
        auto_class: its name.
        architectures: the names of the model classes it loads.
    """

    config_class: ClassVar[type[PretrainedConfig]] = LissomConfig
    auto_class: ClassVar[str] = "AutoModel"
    architectures: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *_: object,
        dtype: torch.dtype | str | None = None,
        device_map: object = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        trusted_keys: TrustedKeys | None = None,
        allow_native: bool = False,
        map_weights: bool = True,
        **others: object,
    ) -> FixedModule:
        """The saved model in a folder, or in a repository of the Hub, which is downloaded.

        Args:
            dtype: of the compiled model, or `auto`.
            torch_dtype: of the compiled model, or `auto`.
            device_map: one device, or `auto` for the one it was compiled for.
            trusted_keys: as for `lissom.load`.
            allow_native: as for `lissom.load`.
            map_weights: as for `lissom.load`.
            **others: options of transformers that say how a model is loaded, such as `low_cpu_mem_usage`, are ignored.

        Raises:
            InputError: if the Auto class loads models of other kinds.
            UnsupportedError: for another dtype, for several devices, or for an option that asks for another model.
            LissomError: as `lissom.load`.
        """
        changed = next((option for option in _OTHER_MODELS if others.get(option)), None)
        if changed is not None:
            raise UnsupportedError(f"'{name}' holds a compiled model, which takes no {changed}=; leave it out")
        for option in others:
            # Other options of transformers are ignored; a misspelled one must not drop the check of a signature.
            if "trust" in option and option != "trust_remote_code":
                raise InputError(f"'{name}' holds a compiled model, which takes no {option}=; give trusted_keys=")
        # Imported when a model is loaded: this module is imported with transformers, perhaps by one of these.
        from lissom.generation.compile import load_generation
        from lissom.generation.directory import is_saved
        from lissom.runtime.compiled_model import load

        device = _one_device(device_map)
        folder = check_path(name)
        if not folder.is_dir():
            folder = download(str(name), revision, token, cache_dir, local_files_only)
        read = load_generation if is_saved(folder) else load
        model: Any = read(folder, device, allow_native=allow_native, trusted_keys=trusted_keys, map_weights=map_weights)
        kind = type(model).__name__
        if cls.architectures and kind not in cls.architectures:
            raise InputError(
                f"'{name}' holds a model of class {kind}, and {cls.auto_class} loads models of other kinds; take the Auto "
                f"class of {kind}, or lissom.load"
            )
        dtype = torch_dtype if dtype is None else dtype
        if dtype not in (None, "auto") and str(dtype).removeprefix("torch.") != str(model.dtype).removeprefix("torch."):
            raise UnsupportedError(
                f"'{name}' was compiled for {model.dtype}, and dtype= is {dtype}; compile the model in that dtype"
            )
        return model


def _one_device(device_map: object) -> str | torch.device | None:
    """The device that a map names. Raises UnsupportedError for several."""
    import torch

    if isinstance(device_map, Mapping):
        places = list(device_map.values())
        # Not a set: what is no device may have no hash.
        device_map = places[0] if places and all(place == places[0] for place in places) else device_map
    if device_map is None or device_map == "auto":
        return None
    # PyTorch has no device of a negative number.
    if isinstance(device_map, int) and device_map >= 0:
        return torch.device(device_map)
    if not isinstance(device_map, (str, torch.device)):
        raise UnsupportedError(f"device_map= is {device_map!r:.80}, and a compiled model runs on one device; give that one")
    return device_map


def download(name: str, revision: str | None, token: str | bool | None, cache_dir: str | None, offline: bool) -> Path:
    """The folder of a saved model from a repository of the Hub, in its cache.

    The cache holds links; an artifact holds regular files, so they are linked or copied beside it.

    Raises:
        ArtifactError: if the repository cannot be read, or holds no saved model.
    """
    from huggingface_hub import snapshot_download

    try:
        snapshot = Path(snapshot_download(name, revision=revision, token=token, cache_dir=cache_dir, local_files_only=offline))
    # The Hub's client raises errors of no common class, of its own and of its HTTP library.
    except Exception as error:
        raise ArtifactError(
            f"'{name}' is no directory, and cannot be read from the Hub: {first_line(error)}; give a directory "
            f"that CompiledModel.save wrote, or connect to the Hub"
        ) from error
    if not is_artifact(snapshot):
        raise ArtifactError(f"the repository '{name}' holds no saved model: it has no {NAME}; name one that push_to_hub wrote")
    folder = snapshot.parent.parent / "lissom" / snapshot.name
    if not is_artifact(folder):
        _copy(snapshot, folder)
    return folder


def _copy(snapshot: Path, folder: Path) -> None:
    """The artifact's own files as regular files in a new folder, which appears complete: other processes may load it too.

    Raises:
        ArtifactError: as `copy_linked`, or if the cache cannot be written.
    """
    try:
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            fresh = Path(temporary) / folder.name
            fresh.mkdir()
            copy_linked(snapshot, fresh, exact=False, place=folder.parent)
            try:
                fresh.rename(folder)
            except OSError:
                # Another process may have been first.
                if not is_artifact(folder):
                    raise
    except OSError as error:
        raise ArtifactError(
            f"the cache of the Hub at '{folder.parent}' cannot be written: {reason(error)}; give another cache_dir="
        ) from error


def register_config() -> None:
    """Make `AutoConfig` know the configuration of saved models."""
    from transformers import AutoConfig

    AutoConfig.register(MODEL_TYPE, LissomConfig, exist_ok=True)
    _refuse_unsigned(AutoConfig)


def _refuse_unsigned(auto_config: Any) -> None:
    """Make `AutoConfig` refuse `trusted_keys=` for a model that Lissom did not save, which is never signed.

    transformers gives an option that is a field of `config.json` to the configuration, and loads the model without it.
    """
    whole = auto_config.from_pretrained.__func__
    if getattr(whole, "refuses_unsigned", False):
        return

    @wraps(whole)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        loaded = whole(cls, pretrained_model_name_or_path, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if options.get("trusted_keys") is not None and not isinstance(config, LissomConfig):
            raise InputError(
                f"'{pretrained_model_name_or_path}' holds no model that Lissom saved, and only these are signed; "
                f"leave trusted_keys= out"
            )
        return loaded

    vars(from_pretrained)["refuses_unsigned"] = True
    auto_config.from_pretrained = classmethod(from_pretrained)


def register_models() -> None:
    """Make every Auto class of models know saved models."""
    register_config()
    from transformers.models.auto import modeling_auto

    for name, auto_class in list(vars(modeling_auto).items()):
        mapping = getattr(auto_class, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None:
            continue
        known: set[str] = set()
        for names in mapping._model_mapping.values():
            known |= {names} if isinstance(names, str) else set(names)
        fields = {"auto_class": name, "architectures": frozenset(known), "__module__": __name__}
        loader = type("SavedModel", (SavedModel,), fields)
        auto_class.register(LissomConfig, loader, exist_ok=True)
