"""Vision transformers of timm and torchvision, by name, with random weights and inputs of their own size."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import nn

from lissom.errors import ArtifactError, UnsupportedError, nearest

_ROWS = 2


def load_timm(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of timm and two pictures of the size in its own configuration.

    Raises:
        ArtifactError: for a name timm does not know.
        UnsupportedError: if timm is not installed.
    """
    timm = _package("timm")
    known: list[str] = timm.list_models()
    if name.split(".")[0] not in known:
        raise ArtifactError(f"timm has no model '{name}'{nearest(name, known) or '; timm.list_models() lists what it has'}")
    try:
        with _same_weights():
            model = timm.create_model(name, pretrained=False).eval()
    except RuntimeError as error:
        architecture, _, tag = name.partition(".")
        raise ArtifactError(
            f"timm has no weights '{tag}' for the model '{architecture}'; leave the tag out, weights are random here: "
            f"timm:{architecture}"
        ) from error
    return model, _pictures(*model.pretrained_cfg["input_size"])


def load_torchvision(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of torchvision and two pictures of the size its weights were trained at, by default 224 x 224.

    Raises:
        ArtifactError: for a name torchvision does not know.
        UnsupportedError: if torchvision is not installed.
    """
    models = importlib.import_module(f"{_package('torchvision').__name__}.models")
    known: list[str] = models.list_models()
    if name not in known:
        hint = nearest(name, known) or "; torchvision.models.list_models() lists what it has"
        raise ArtifactError(f"torchvision has no model '{name}'{hint}")
    size = _crop_size(models.get_model_weights(name))
    # Detection and segmentation models would download the weights of their backbone.
    takes_backbone = "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
    options = {"weights_backbone": None} if takes_backbone else {}
    with _same_weights():
        return models.get_model(name, weights=None, **options).eval(), _pictures(3, *size)


@contextmanager
def _same_weights() -> Generator[None]:
    """Random weights that are the same in every process; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _crop_size(weights) -> tuple[int, int]:  # noqa: ANN001
    """The crop size in the transforms of a model's first weights."""
    first = next(iter(weights), None)
    # The transforms of detection models are a class without options.
    options = getattr(first.transforms, "keywords", {}) if first is not None else {}
    size = options.get("crop_size", 224)
    return (size, size) if isinstance(size, int) else tuple(size)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"models of {name} need {name}: pip install 'lissom[vision]'") from error


def _pictures(channels: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(_ROWS, channels, height, width, generator=torch.Generator().manual_seed(0))
