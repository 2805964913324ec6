"""Models by name: a directory, a packaged model, an ONNX file, a model of timm or torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lissom.errors import ArtifactError
from lissom.frontends.models import huggingface, vision
from lissom.frontends.onnx import model as onnx

NAMES = (
    f"A checkpoint directory; a packaged model ({', '.join(huggingface.PACKAGED)}); an ONNX file (model.onnx); a model of "
    f"timm or torchvision with random weights (timm:vit_tiny_patch16_224, torchvision:vit_b_16)."
)
"""A sentence on the names `load` takes."""


@dataclass(frozen=True)
class Source:
    """A model with example inputs.

    Attributes:
        notes: sentences on how the inputs were made, and on missing weights.
        checkpoint: of a transformers model, with its tokenizer.
    """

    model: nn.Module
    example_inputs: torch.Tensor | Mapping[str, object]
    notes: tuple[str, ...] = ()
    checkpoint: huggingface.Checkpoint | None = None


def load(name: str, *, with_inputs: bool = True) -> Source:
    """The model of that name, and example inputs for it.

    Args:
        with_inputs: as for `huggingface.load`.

    Raises:
        ArtifactError: if there is no such model, or it cannot be read.
        UnsupportedError: if a package is missing, or the model cannot be converted.
    """
    library, colon, model_name = name.partition(":")
    if colon and library in ("timm", "torchvision"):
        model, pictures = (vision.load_timm if library == "timm" else vision.load_torchvision)(model_name)
        sizes = " x ".join(map(str, pictures.shape))
        return Source(model, pictures, (f"random weights; example inputs: random pictures, {sizes}",))
    if name.endswith(".onnx") or Path(name).is_file():
        if not name.endswith(".onnx"):
            raise ArtifactError(f"{name} is a file, but its name does not end in .onnx; give an ONNX file or a directory")
        onnx_model = onnx.read(name)
        return Source(onnx_model.module, onnx_model.example_inputs(), (f"example inputs: {onnx_model.describe_inputs()}",))
    checkpoint = huggingface.load(name, with_inputs=with_inputs)
    return Source(checkpoint.model, checkpoint.example_inputs, checkpoint.notes, checkpoint)
