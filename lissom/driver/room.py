"""A large model that is compiled from the disk: the memory and disk that this takes, estimated before it begins."""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from lissom.backends.base import Backend
from lissom.backends.eager.backend import Eager
from lissom.compiler.paging import folder_of_files, is_large, paged
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.driver.options import BuildSettings, resolve_passes
from lissom.errors import UnsupportedError
from lissom.frontends.checkpoints.stored_weights import PackedWeight, StoredWeight, describe_stored, stored_form
from lissom.ops.block_formats import BLOCK_FORMATS
from lissom.ops.formats import FORMATS
from lissom.ops.native import missing_weight_quantized_kernel
from lissom.passes.quantize.quantize import Quantize
from lissom.passes.quantize.use_stored_weights import UseStoredWeights

Options = TypeVar("Options", bound=BuildSettings)
_BITS = {"int4": 5.0, "int8": 8.5, "auto": 8.5, "fp8": 8.5} | {form.name: form.bits for form in BLOCK_FORMATS.values()}
"""Bits of a quantized weight, with its scales, by the beginning of a scheme's name."""
_STORED = 6.5
"""Bits of a weight as GGUF files store it; those of quantized checkpoints have four or eight, and scales."""


def default_passes(model: nn.Module, backend: str | Backend, device: str | torch.device | None) -> str:
    """The passes for a model that was loaded for this alone, where none are given.

    `use-stored-weights` for a GGUF file or a quantized checkpoint whose weights the kernels read; `exact` otherwise.
    """
    on_cpu = backend == Eager.name and torch.device(device or "cpu").type == "cpu"
    if not on_cpu or missing_weight_quantized_kernel(torch.float32, torch.device("cpu")) or not describe_stored(model):
        return "exact"
    return UseStoredWeights.name()


def with_default_passes(settings: Options, model: nn.Module) -> Options:
    """The settings for such a model, with the default passes where none are given."""
    if settings.passes is not None:
        return settings
    return replace(settings, passes=default_passes(model, settings.backend, settings.device))


@contextmanager
def from_disk(model: nn.Module, passes: str | Pass | Sequence[Pass] | None) -> Generator[None]:
    """Compile a model from the disk inside the block, if it is large, and was loaded for this alone.

    Raises:
        UnsupportedError: if memory or disk do not suffice.
    """
    weights = [*model.parameters(), *model.buffers()]
    if is_large(weights):
        _check_room(model, resolve_passes(passes))
    forms = (stored_form(weight) for weight in weights)
    with paged(weights, [form.blocks for form in forms if isinstance(form, StoredWeight)]):
        yield


def _check_room(model: nn.Module, passes: Sequence[Pass]) -> None:
    """Refuse a model whose result does not fit into the memory, or its weights on the way there on the disk."""
    bits = [_BITS[pass_.scheme.partition("-")[0]] for pass_ in passes if isinstance(pass_, Quantize)]
    bits += [_stored_bits(model) for pass_ in passes if isinstance(pass_, UseStoredWeights)]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    held = made = 0.0
    for weight in model.parameters():
        # Tables are looked up where they are, and their rows are read.
        size = weight.numel() * min(bits) / 8 if bits and weight.dim() > 1 and id(weight) not in tables else weight.nbytes
        held += 0 if id(weight) in tables else size
        made += size if weight.dim() > 1 else 0
    free = _free_memory()
    if free is not None and held > free:
        raise UnsupportedError(
            f"the weights of the result take about {held / 1e9:.3g} GB, and {free / 1e9:.3g} GB of memory are free; quantize "
            f"them to fewer bits, or share the model among machines"
        )
    folder = folder_of_files()
    # In two forms at once: as integers, and packed for the kernels.
    if Path(folder).is_dir() and (left := shutil.disk_usage(folder).free) < 2 * made:
        raise UnsupportedError(
            f"compiling takes up to {2 * made / 1e9:.3g} GB of {folder} for a while, and {left / 1e9:.3g} GB are free there; "
            f"set TMPDIR to a folder with more room"
        )


def _stored_bits(model: nn.Module) -> float:
    """Bits of a weight as its file stores it, with its scale: the most of any weight of a quantized checkpoint."""
    packed = [stored for weight in model.parameters() if isinstance(stored := stored_form(weight), PackedWeight)]
    return max((FORMATS[stored.format].bits + 0.5 for stored in packed), default=_STORED)


def _free_memory() -> float | None:
    """The bytes of memory that the process may still take; None where that is not known."""
    try:
        known = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return None if known is None else 1024.0 * int(known[1])
