"""The artifacts that are mutated: small models of every kind that Lissom saves, with inputs and expected outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import lissom
from lissom.artifacts.artifact import read_program
from lissom.artifacts.directory import read_directory, verified_path
from lissom.artifacts.rank_files import weights_file
from lissom.artifacts.weights import Place, load_alone
from tests.support.decoders import MAX_LENGTH, decoder, prompt
from tests.support.models import Case, counter, feed_forward, tiny_bert

Answer = list[object]
"""The leaves of a model's outputs."""


@dataclass(frozen=True)
class Sample:
    """One kind of artifact.

    save: writes it into a new folder. load: returns the callable that runs on the sample's inputs.
    """

    save: Callable[[Path], None]
    load: Callable[[Path], Callable[[], Answer]]


def _leaves(tree: object) -> Answer:
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(tree)]


def _compiled(build: Callable[[], Case], **options: Any) -> Sample:
    def save(folder: Path) -> None:
        case = build()
        lissom.compile(case.model, case.inputs, checks="off", goal=None, **options).save(folder)

    def load(folder: Path) -> Callable[[], Answer]:
        model, case = lissom.load(folder), build()
        model.report.history.diff(0, 0)  # texts are read when they are asked for
        return lambda: _leaves(model(*case.args, **case.kwargs))

    return Sample(save, load)


def _save_decoder(folder: Path) -> None:
    lissom.compile_generation(decoder("llama"), max_length=MAX_LENGTH).save(folder)


def _load_decoder(folder: Path) -> Callable[[], Answer]:
    model = lissom.load_generation(folder)
    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return lambda: _leaves(model.generate(**prompt(), **greedy))


def _save_ranks(folder: Path) -> None:
    case = tiny_bert()
    lissom.compile(case.model, case.inputs, backend="distributed", world_size=2, checks="off").save(folder)


def _load_rank(folder: Path) -> Callable[[], Answer]:
    """The loaded program of rank 0; it cannot run without the other rank."""
    manifest = read_directory(folder)
    name = weights_file(0)

    def read_weights(_: object, place: Place) -> dict[str, torch.Tensor]:
        with verified_path(folder / name, manifest.content_of(name, folder)) as path:
            return load_alone(path, place)

    program = read_program(folder, manifest, read_weights, lambda device: device)
    return lambda: _leaves(list(program.weights().values()))


SAMPLES: Mapping[str, Sample] = {
    "bert": _compiled(tiny_bert),
    "plain": _compiled(feed_forward, passes="remove-no-ops"),
    "int8": _compiled(tiny_bert, passes="quantize"),
    "counter": _compiled(counter),
    "decoder": Sample(_save_decoder, _load_decoder),
    "onnx": _compiled(feed_forward, backend=lissom.OnnxRuntime(threads=1, timing_seconds=0.0)),
    "ranks": Sample(_save_ranks, _load_rank),
}
