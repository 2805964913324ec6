"""Load what `CompiledModel.save` wrote."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from lissom.api import CompiledModel
from lissom.artifacts import rank_files
from lissom.artifacts.artifact import Loaded, Trust
from lissom.backends.base import Backend
from lissom.driver.options import check_path
from lissom.frontends.device import check_device
from lissom.inspect.tables import Report
from lissom.runtime.hosted_model import Facts


def load(
    directory: str | Path,
    device: str | torch.device | None = None,
    *,
    backend: str | Backend | None = None,
    allow_native: bool = False,
    trusted_keys: Sequence[str | Path] | None = None,
) -> CompiledModel:
    """The model that `CompiledModel.save` wrote, its weights mapped from the file. Nothing is unpickled.

    device: where it is to run; where it was made to run by default. What differs here from where it was made, such as kernels
    that are missing, is said in a warning.
    backend: the backend it was saved for, by name, or with options in place of those it was saved with:
        `lissom.OnnxRuntime(threads=1)`.
    allow_native: load native code that the artifact holds or names: what `inductor` compiled, libraries that options name.
    trusted_keys: PEM files of Ed25519 public keys, one of which must have signed it (`lissom sign`).

    Of a model for several ranks, each of a group of that many gets its part, and opens no other's.

    Raises: ArtifactError when the directory is no artifact, was changed or damaged, is not signed by a trusted key, holds
        native code that is not allowed, or does not run here; UnsupportedError for a device or a package that is not there,
        or a process that is none of so many ranks; RankError when one is gone.

    >>> import tempfile, torch, lissom
    >>> folder = tempfile.mkdtemp() + "/model"
    >>> lissom.compile(torch.nn.Linear(4, 2), torch.ones(3, 4)).save(folder)
    >>> lissom.load(folder)
    CompiledModel(Linear(input: f32[batch, 4]), backend='eager')
    """
    loaded = rank_files.load(check_path(directory), check_device(device), backend, Trust(allow_native, trusted_keys))
    for note in loaded.notes:
        warnings.warn(note, stacklevel=2)
    return compiled_from(loaded)


def compiled_from(loaded: Loaded) -> CompiledModel:
    """The model that an artifact holds."""
    report = Report(f"{loaded.program.name} on {loaded.backend.name}", loaded.history)
    return CompiledModel(loaded.program, loaded.executable, report, loaded.backend, Facts.from_json(loaded.facts))
