"""Calibration data from files and metrics by name: the options `--data`, `--metric` and `--max-drop`."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from lissom.artifacts.arrays import read_arrays
from lissom.compiler.pipeline.options import Metric
from lissom.errors import ArtifactError, UnsupportedError, nearest
from lissom.frontends.models.sources import Source

Batch = dict[str, object]
FORMATS = "an .npz file or a folder of them, with an array per argument; .txt, a text per line; .jsonl, texts as JSON"
_ROWS = 8
_MOST_TOKENS = 512


def read_texts(path: Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        ArtifactError: if it cannot be read, or has none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"'{path}' cannot be read as text: {error}") from error
    if not lines:
        raise ArtifactError(f"'{path}' holds no text; give one text per line")
    return lines


def read_data(path: Path, source: Source, device: torch.device | None = None) -> list[Batch]:
    """The calibration batches in a file or folder, as keyword arguments of the model, on a device.

    Raises:
        ArtifactError: if the data cannot be read.
        UnsupportedError: for texts if the model has no tokenizer.
    """
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise ArtifactError(f"the folder '{path}' holds no .npz file; give {FORMATS}")
        return [_complete(_read_arrays(file), source, device) for file in files]
    if path.suffix == ".npz":
        return [_complete(_read_arrays(path), source, device)]
    if path.suffix not in (".txt", ".jsonl"):
        raise ArtifactError(f"'{path}' is not a file of calibration data; give {FORMATS}")
    texts = _json_texts(path) if path.suffix == ".jsonl" else read_texts(path)
    return [_complete(batch, source, device) for batch in _encoded(texts, path, source)]


def _read_arrays(path: Path) -> Batch:
    try:
        return {name: torch.from_numpy(array) for name, array in read_arrays(path).items()}
    except TypeError as error:
        raise ArtifactError(f"'{path}' cannot be read as tensors: {error}; write numbers, by the arguments' names") from error


def _json_texts(path: Path) -> list[str]:
    """The texts of a JSON Lines file: each line a string, or an object with the field `text`."""
    texts: list[str] = []
    for number, line in enumerate(read_texts(path), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"'{path}', line {number} is not JSON: {error}") from error
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ArtifactError(f'\'{path}\', line {number} holds no text; write "a text" or {{"text": "a text"}}')
        texts.append(text)
    return texts


def _encoded(texts: Sequence[str], path: Path, source: Source) -> list[Batch]:
    """Batches of token ids, padded to the longest text of a batch and truncated to the model's maximum length."""
    tokenizer = source.checkpoint.tokenizer if source.checkpoint is not None else None
    if tokenizer is None:
        raise UnsupportedError(f"'{path}' holds texts, and the model has no tokenizer; give .npz files with its arguments")
    longest = min(_MOST_TOKENS, tokenizer.model_max_length)
    batches: list[Batch] = []
    for start in range(0, len(texts), _ROWS):
        rows = list(texts[start : start + _ROWS])
        encoded = tokenizer(rows, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        batches.append({name: tensor for name, tensor in encoded.items() if name in source.example_inputs})
    return batches


def _complete(batch: Batch, source: Source, device: torch.device | None) -> Batch:
    """The batch on a device, with non-tensor arguments such as `use_cache` taken from the example inputs."""
    example = source.example_inputs
    named = {} if isinstance(example, torch.Tensor) else example
    return {name: value for name, value in named.items() if not isinstance(value, torch.Tensor)} | _moved(batch, device)


def _moved(batch: Batch, device: torch.device | None) -> Batch:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def make_metric(name: str, source: Source, data: Sequence[Batch], device: torch.device | None = None) -> Metric:
    """The metric of that name, or the function `module:function`.

    Args:
        data: the batches it is measured on; if empty, the example inputs.
        device: of the models that are scored.

    Raises:
        UnsupportedError: if there is none.
    """
    if ":" in name:
        return _imported(name)
    if name not in METRICS:
        raise UnsupportedError(
            f"there is no metric '{name}'{nearest(name, METRICS) or ';'} choose {', '.join(METRICS)}, or write module:function"
        )
    measure = METRICS[name]
    batches = [_moved(batch, torch.device("cpu")) for batch in data or [_example(source)]]
    wanted: list[torch.Tensor] = []

    def score(model: Callable[..., object]) -> float:
        with torch.no_grad():
            # The original model runs when the first score is needed, which is after its capture.
            wanted.extend(_answer(source.model(**batch)) for batch in batches[len(wanted) :])
            outputs = [_answer(model(**_moved(batch, device))) for batch in batches]
        scores = [measure(one, other, batch) for one, other, batch in zip(wanted, outputs, batches, strict=True)]
        return sum(scores) / len(scores)

    # Metrics are told apart by it.
    score.__qualname__ = name
    return score


def _example(source: Source) -> Batch:
    example = source.example_inputs
    if isinstance(example, torch.Tensor):
        return {next(iter(inspect.signature(source.model.forward).parameters)): example}
    return dict(example)


def _imported(name: str) -> Metric:
    module, _, function = name.partition(":")
    # As `python -m` does: a console script has its own folder on the path, not the user's.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        metric: Metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnsupportedError(f"the metric '{name}' cannot be imported: {error}") from error
    if not callable(metric):
        raise UnsupportedError(f"the metric '{name}' is a {type(metric).__name__}; give a function of a model")
    return metric


def _answer(outputs: object) -> torch.Tensor:
    """The first floating-point tensor a model returns: the last hidden state, or the logits."""
    leaves = pytree.tree_leaves(outputs)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.detach().float().cpu()
    raise UnsupportedError("the model returns no floating-point tensor; write a metric of your own as module:function")


def _real(tensor: torch.Tensor, batch: Mapping[str, object]) -> torch.Tensor:
    """The vectors at positions without padding, [positions, features]."""
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and tensor.shape[:2] == mask.shape:
        return tensor[mask != 0]
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def _cosine(wanted: torch.Tensor, actual: torch.Tensor, batch: Mapping[str, object]) -> float:
    return float(torch.cosine_similarity(_real(wanted, batch).double(), _real(actual, batch).double(), dim=-1).mean())


def _agreement(wanted: torch.Tensor, actual: torch.Tensor, batch: Mapping[str, object]) -> float:
    return float((_real(wanted, batch).argmax(-1) == _real(actual, batch).argmax(-1)).float().mean())


METRICS: Mapping[str, Callable[[torch.Tensor, torch.Tensor, Mapping[str, object]], float]] = {
    "cosine": _cosine,
    "agreement": _agreement,
}
"""Metrics without labels: mean cosine of output vectors to the original's, and the fraction of equal argmax logits."""
