"""Loading a saved decoder: an artifact that also holds the configuration and the tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, GenerationConfig

from lissom.artifacts import rank_files
from lissom.artifacts.artifact import Trust
from lissom.artifacts.directory import verified_bytes
from lissom.artifacts.manifest import Content
from lissom.artifacts.model_files import CONFIG, original_fields
from lissom.artifacts.packed import load_packed
from lissom.backends.base import Backend
from lissom.compiler.ir.program import Program
from lissom.errors import ArtifactError
from lissom.frontends.capture.device import check_device
from lissom.frontends.capture.failures import first_line
from lissom.frontends.generation.decoder import SHORTEST
from lissom.frontends.generation.pool import INPUTS as POOL_INPUTS
from lissom.generation.directory import DRAFT, ENCODER, GENERATION, POOL, PROPOSER, Parts, PoolSizes, is_former, is_saved
from lissom.generation.proposers import PROMPT_LOOKUP
from lissom.io.fields import check_fields, count, parse_json, shown, take
from lissom.runtime.compiled_model import CompiledModel, compiled_from

Made = TypeVar("Made")


def read(
    directory: Path,
    device: str | torch.device | None,
    backend: str | Backend | None,
    trust: Trust,
    *,
    pooled: bool = False,
) -> Parts:
    """The parts of the decoder in the directory. Raises ArtifactError, UnsupportedError.

    Args:
        pooled: whether it must be one for several texts, or must not.
    """
    if is_former(directory):
        raise ArtifactError(
            f"'{directory}' was saved by an earlier Lissom, without hashes of its configuration; "
            f"compile the model again with lissom.compile_generation, and save it to another directory"
        )
    if not is_saved(directory):
        raise ArtifactError(f"'{directory}' holds no saved decoder; name a directory that its save wrote")
    if pooled != (directory / POOL).is_file():
        held, function = ("one text at a time", "load_generation") if pooled else ("several texts", "load_pool")
        raise ArtifactError(f"'{directory}' holds a decoder for {held}; load it with lissom.{function}")
    rank_files.check_ranks(directory, f"generate {directory} PROMPT", trust)
    loaded = rank_files.load(directory, check_device(device), backend, trust)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=3)
    config = _read(directory / CONFIG, loaded.files, configuration_of)
    # As transformers does: pipelines look for the tokenizer and other files of the model there.
    config._name_or_path = str(directory)
    generation = _read(directory / GENERATION, loaded.files, GenerationConfig.from_dict)
    # The hash of the outer artifact, and so its signature, covers the programs inside.
    inner = Trust(trust.allow_native, map_weights=trust.map_weights)

    def packed(name: str) -> CompiledModel | None:
        if name not in loaded.files:
            return None
        read_folder = partial(rank_files.load, device=check_device(device), backend=backend, trust=inner)
        return load_packed(directory / name, lambda folder: compiled_from(read_folder(folder)), loaded.files[name])

    named = _read(directory / PROPOSER, loaded.files, _proposer) if PROPOSER in loaded.files else None
    sizes = _read(directory / POOL, loaded.files, partial(_pool_sizes, program=loaded.program)) if pooled else None
    return Parts(compiled_from(loaded), config, generation, packed(ENCODER), named or packed(DRAFT), sizes)


def _pool_sizes(fields: dict[str, Any], program: Program) -> PoolSizes:
    """The sizes in a file `pool.json`, if the program is one for several texts and has them."""
    check_fields(fields, PoolSizes)
    sizes = PoolSizes(count(take(fields, "max_length", int)), count(take(fields, "sequences", int)))
    if tuple(tensor.path for tensor in program.signature.tensors) != POOL_INPUTS:
        raise ValueError(f"the program does not take {', '.join(POOL_INPUTS)}")
    (slots,) = program.signature.tensors[3].type.shape
    if not isinstance(slots, int) or not (SHORTEST <= sizes.max_length <= slots and 1 <= sizes.sequences <= slots):
        raise ValueError(f"a pool of {slots} slots has no texts of {sizes.max_length} tokens, {sizes.sequences} at once")
    return sizes


def _proposer(fields: dict[str, Any]) -> str:
    """The name in a file `draft.json`."""
    if fields != {"draft": PROMPT_LOOKUP}:
        raise ValueError(f"there is no draft {shown(fields)}")
    return PROMPT_LOOKUP


def configuration_of(fields: dict[str, Any]) -> Any:
    """The configuration of transformers with these fields, as they were when the decoder was saved."""
    fields = original_fields(fields)
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"there is no model of type {shown(kind)}")
    return CONFIG_MAPPING[kind].from_dict(fields)


def _read(path: Path, files: Mapping[str, Content], make: Callable[[dict[str, Any]], Made]) -> Made:
    """The object transformers makes of a JSON file, whose hash is checked first. Raises ArtifactError."""
    if path.name not in files:
        raise ArtifactError(f"'{path.parent}' holds no saved decoder: it has no {path.name}; save the decoder again")
    # A configuration may hold infinities, and a very large length that means no limit.
    fields = parse_json(verified_bytes(path, files[path.name]), path, any_number=True)
    try:
        if not isinstance(fields, dict):
            raise ValueError(f"{shown(fields)} is not a table")
        return make(fields)
    # The errors transformers raises for values of a wrong type.
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ArtifactError(f"'{path}' holds what cannot be read: {first_line(error)}; save the decoder again") from error
