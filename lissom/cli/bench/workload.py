"""The workload of a comparison: a model, inputs of given shapes from real text, and PyTorch's outputs in float32."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from lissom.errors import UnsupportedError
from lissom.frontends.capture.failures import first_line
from lissom.frontends.models.huggingface import SENTENCES
from lissom.frontends.models.sources import Source, load

Inputs = dict[str, torch.Tensor]
Array = NDArray[np.generic]

DEFAULT_SHAPES = "1x32,1x128,8x128"
_EXAMPLE = "example"
"""The name of the only shape of models without text inputs: the shape of their example inputs."""
_RAGGED = "ragged"
_CALIBRATION = 100
_MOST_TOKENS = 1 << 22


@dataclass(frozen=True)
class Shape:
    """Rows and tokens per row: text truncated to `tokens`, or, with None, whole texts padded to the longest.

    Rows of inputs other than text, such as pictures, have 0 tokens.
    """

    batch: int
    tokens: int | None

    def __str__(self) -> str:
        return str(self.batch) if self.tokens == 0 else f"{self.batch}x{self.tokens or _RAGGED}"


@dataclass(frozen=True)
class Model:
    """A model in float32.

    Attributes:
        constants: its arguments that are not tensors.
        example: the inputs it was loaded with; generated ones have two rows.
    """

    name: str
    source: Source
    example: Inputs
    constants: Mapping[str, object]

    @property
    def tokenized(self) -> bool:
        """True if it reads text and has a tokenizer."""
        return self.source.checkpoint is not None and self.source.checkpoint.tokenizer is not None

    def __call__(self, inputs: Inputs) -> object:
        return self.source.model(**inputs, **self.constants)


@dataclass(frozen=True)
class Workload:
    """The input files of workers, by shape name.

    Attributes:
        calibration: files of single texts, for engines that calibrate.
    """

    model: str
    shapes: Mapping[str, Path]
    calibration: tuple[Path, ...]


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The shapes of a list such as `1x32,8x128`; `32xragged` stands for texts padded to the longest, `8` for 8 pictures.

    Raises:
        UnsupportedError: naming a part that is not a shape.
    """
    shapes: list[Shape] = []
    for part in text.split(","):
        match = re.fullmatch(rf"\s*([1-9]\d*)(?:x([1-9]\d*|{_RAGGED}))?\s*", part)
        if match is None:
            raise UnsupportedError(f"'{part}' is not a shape; write rows x tokens, for example 1x32,8x128,32x{_RAGGED}")
        shape = Shape(int(match[1]), None if match[2] == _RAGGED else int(match[2] or 0))
        if shape.batch * (shape.tokens or 1) > _MOST_TOKENS:
            raise UnsupportedError(
                f"'{part.strip():.80}' is {shape.batch * (shape.tokens or 1):,} tokens; give {_MOST_TOKENS:,} or fewer"
            )
        shapes.append(shape)
    return tuple(dict.fromkeys(shapes))


def load_model(name: str) -> Model:
    """The model of that name, its weights in float32. Raises as `lissom.frontends.models.sources.load`."""
    source = load(name)
    example = source.example_inputs
    if isinstance(example, torch.Tensor):
        example = {next(iter(inspect.signature(source.model.forward).parameters)): example}
    tensors = {key: value for key, value in example.items() if isinstance(value, torch.Tensor)}
    constants = {key: value for key, value in example.items() if key not in tensors}
    return Model(name, replace(source, model=source.model.float().eval()), tensors, constants)


def prepare(model: Model, shapes: Sequence[Shape] | None, texts: Sequence[str] | None, folder: Path) -> Workload:
    """Write the inputs of every shape with PyTorch's outputs into the folder, and calibration inputs if texts are given.

    Raises:
        UnsupportedError: as `make_inputs`, or for a shape the model does not run at.
    """
    inputs = make_inputs(model, shapes, texts)
    files = {name: _write(folder / f"{name}.npz", given, _wanted(model, name, given)) for name, given in inputs.items()}
    single = Shape(1, None)
    calibration = [encode(model, single, [text]) for text in (texts or ())[:_CALIBRATION]] if model.tokenized else []
    kept = (_write(folder / f"calibration-{index}.npz", given) for index, given in enumerate(calibration))
    return Workload(model.name, files, tuple(kept))


def make_inputs(model: Model, shapes: Sequence[Shape] | None, texts: Sequence[str] | None) -> dict[str, Inputs]:
    """Inputs by the name of their shape.

    Args:
        shapes: None for the usual ones; without a tokenizer numbers of rows, or None for the example's.
        texts: two sentences by default.

    Raises:
        UnsupportedError: for shapes with tokens if there is no tokenizer, and without tokens if there is one.
    """
    if model.tokenized:
        chosen = shapes or parse_shapes(DEFAULT_SHAPES)
        if any(shape.tokens == 0 for shape in chosen):
            raise UnsupportedError(f"{model.name} reads text; write rows x tokens, for example {DEFAULT_SHAPES}")
        return {str(shape): encode(model, shape, texts or SENTENCES) for shape in chosen}
    if any(shape.tokens != 0 for shape in shapes or ()):
        raise UnsupportedError(f"{model.name} has no tokenizer to fill a shape with text; give numbers of rows, such as 1,8")
    return {str(shape): _rows(model.example, shape.batch) for shape in shapes or ()} or {_EXAMPLE: model.example}


def _rows(example: Inputs, count: int) -> Inputs:
    """The example inputs with so many rows, repeated where there are fewer."""
    return {name: tensor[torch.arange(count) % len(tensor)] for name, tensor in example.items()}


def encode(model: Model, shape: Shape, texts: Sequence[str]) -> Inputs:
    """Inputs of that shape from real text: row i begins with text i, and continues with the next texts until it is full."""
    checkpoint = model.source.checkpoint
    assert checkpoint is not None
    if shape.tokens is None:
        rows = [texts[row % len(texts)] for row in range(shape.batch)]
    else:
        rows = [_running_text(texts, row, shape.tokens) for row in range(shape.batch)]
    encoded = checkpoint.encode(rows, shape.tokens)
    return {name: encoded[name] for name in model.example if name in encoded}


def _running_text(texts: Sequence[str], first: int, tokens: int) -> str:
    """The texts from index `first` on, joined until there are `tokens` words: a word is at least one token."""
    words: list[str] = []
    while len(words) < tokens:
        words += texts[first % len(texts)].split()
        first += 1
    return " ".join(words[:tokens])


def _wanted(model: Model, shape: str, inputs: Inputs) -> Array:
    try:
        with torch.inference_mode():
            return answer(model(inputs))
    except (IndexError, RuntimeError, ValueError) as error:
        raise UnsupportedError(f"{model.name} does not run at {shape}: {first_line(error)}") from error


def answer(outputs: object) -> Array:
    """The first floating-point tensor or array in a model's outputs, in float32: the last hidden state, or the logits."""
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.detach().float().numpy()
        if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating):
            return leaf.astype(np.float32, copy=False)
    raise UnsupportedError("the model returns no floating-point tensor to compare")


def cosine(actual: Array, wanted: Array, mask: Array | None) -> float:
    """The cosine between two outputs, each as one vector; without padding if the mask, [batch, tokens], fits them.

    Raises:
        UnsupportedError: if they differ in shape.
    """
    if actual.shape != wanted.shape:
        raise UnsupportedError(f"the answer has shape {list(actual.shape)}; PyTorch's has {list(wanted.shape)}")
    if mask is not None and wanted.shape[:2] == mask.shape:
        actual, wanted = actual[mask != 0], wanted[mask != 0]
    one, other = (output.astype(np.float64).ravel() for output in (actual, wanted))
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def _write(path: Path, inputs: Inputs, wanted: Array | None = None) -> Path:
    arrays = {f"input {name}": tensor.numpy() for name, tensor in inputs.items()}
    arrays |= {"wanted": wanted} if wanted is not None else {}
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def read_inputs(path: Path) -> Inputs:
    """The inputs in a file of a workload."""
    with np.load(path, allow_pickle=False) as arrays:
        names = [name for name in arrays.files if name.startswith("input ")]
        return {name.removeprefix("input "): torch.from_numpy(arrays[name]) for name in names}


def read_wanted(path: Path) -> Array:
    """PyTorch's outputs in a file of a workload."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["wanted"]
