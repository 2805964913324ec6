"""Artifacts for several ranks: one shared program, and one file of weights per rank; a rank opens only its own.

The program is stored before lowering, so that it runs on other devices and processors. The ranks save together: rank 0 writes
the shared files, every rank its own weights, into a directory that all of them can access.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lissom.artifacts import artifact
from lissom.artifacts.directory import read_directory, verified_path, write_directory
from lissom.artifacts.manifest import Manifest
from lissom.artifacts.weights import Place, load_alone, save_weights
from lissom.backends.base import Backend
from lissom.backends.distributed.backend import (
    MOST_RANKS,
    Distributed,
    Held,
    RankProgram,
    append_steps,
    facts_of,
    lower_rank,
    torchrun,
)
from lissom.backends.distributed.ranks import current_ranks, in_group
from lissom.compiler.ir.program import Program
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.pipeline.history import History
from lissom.errors import ArtifactError, UnsupportedError
from lissom.io.fields import shown
from lissom.ops.native import load_kernels


def weights_file(rank: int) -> str:
    """The name of the file with a rank's weights."""
    return f"rank-{rank}.safetensors"


def save(directory: Path, compiled: artifact.Compiled) -> None:
    """Write an artifact for one process or for several ranks; errors as for `save_artifact`.

    All ranks of a group must call it.

    Raises:
        RankError: if a rank ended or does not answer.
    """
    executable = compiled.executable
    if not isinstance(executable, (Held, RankProgram)):
        artifact.save_artifact(directory, compiled)
        return
    shared = partial(_write_shared, replace(compiled, history=executable.history or compiled.history), executable.world_size)
    if isinstance(executable, RankProgram):
        _save_together(directory, executable, shared)
        return
    partitioned = executable.stored
    assert isinstance(partitioned, PartitionedProgram)

    def write(folder: Path) -> None:
        for rank in range(len(partitioned.ranks)):
            _write_rank(partitioned.of_rank(rank), rank, folder)
        shared(partitioned.of_rank(0), folder)

    write_directory(directory, write)


def _write_shared(compiled: artifact.Compiled, world_size: int, program: Program, folder: Path) -> None:
    for rank in range(world_size):
        if not (folder / weights_file(rank)).is_file():
            raise ArtifactError(
                f"rank {rank} wrote its weights elsewhere than where rank 0 sees '{folder}'; "
                f"choose a directory that all ranks share"
            )
    artifact.write_program(replace(compiled, program=program), {}, folder)


def _write_rank(program: Program, rank: int, folder: Path) -> None:
    if not folder.is_dir():
        raise ArtifactError(f"rank {rank} does not see the directory '{folder.parent}'; choose one that all ranks share")
    save_weights(program, folder / weights_file(rank), alone=True)


def _save_together(directory: Path, executable: RankProgram, shared: partial[None]) -> None:
    """Save from all ranks: each writes its weights into the directory that rank 0 makes."""
    ranks, program = executable.ranks, executable.stored

    def write(enter: Callable[[Path], None]) -> None:
        def fill(folder: Path) -> None:
            enter(folder)
            shared(program, folder)

        write_directory(directory, fill)

    def own(folder: Path) -> None:
        ranks.settle(partial(_write_rank, program, ranks.rank, folder), program.name)

    ranks.share_directory(write, own, program.name)


def load(
    directory: Path,
    device: torch.device | None = None,
    backend: str | Backend | None = None,
    trust: artifact.Trust = artifact.NO_TRUST,
) -> artifact.Loaded:
    """The artifact in a directory, or this rank's shard of one for several ranks; arguments and errors as for `load_whole`.

    Raises:
        UnsupportedError: if the process group has another size.
        RankError: if a rank ended or does not answer.
    """
    manifest = read_directory(
        directory, lambda parsed: parsed.files if parsed.backend == Distributed.name else artifact.CHECKED_HERE, trust.keys
    )
    if manifest.backend != Distributed.name:
        return artifact.load_whole(directory, manifest, device, backend, trust)
    _check_group(manifest, directory, f"run {directory} --input FILE")
    chosen = artifact.find_saved_backend(manifest, directory, backend)
    assert isinstance(chosen, Distributed)
    ranks = current_ranks(chosen.timeout_seconds, chosen.shared_memory)
    with ranks.working(manifest.name):
        part = ranks.settle(
            partial(_load_part, directory, chosen, device, trust),
            manifest.name,
            tell=lambda part: facts_of(part.stored, part.lowered),
        )
        executable = RankProgram(part.lowered, part.stored, ranks, part.history)
    history = append_steps(part.history, part.lowering)
    return artifact.Loaded(part.lowered, executable, history, chosen, manifest.facts, _notes(part.lowered), manifest.files)


def _notes(program: Program) -> tuple[str, ...]:
    """A note if this rank has no kernels, as in `load_whole`; here each rank lowers its own program."""
    on_cpu = all(leaf.type.device.type == "cpu" for leaf in program.signature.tensors)
    reason = load_kernels() if on_cpu else None
    return (f"{program.name} runs slowly without C++ kernels: {reason}",) if reason else ()


@dataclass(frozen=True)
class _Part:
    """A rank's program as stored and lowered.

    Attributes:
        history: of the stored program.
        lowering: the steps that lowered it.
    """

    stored: Program
    lowered: Program
    history: History
    lowering: History


def _load_part(directory: Path, backend: Distributed, device: torch.device | None, trust: artifact.Trust) -> _Part:
    rank = torch.distributed.get_rank()
    manifest = read_directory(directory, lambda parsed: parsed.files, trust.keys)
    if weights_file(rank) not in manifest.files:
        raise ArtifactError(f"the manifest of '{directory}' names no '{weights_file(rank)}'; copy it whole, or save again")
    if device is None and manifest.device.startswith("cuda") and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    saved, wanted = artifact.find_devices(manifest, directory, device)

    def read_weights(_: object, place: Place) -> dict[str, torch.Tensor]:
        name = weights_file(rank)
        with verified_path(directory / name, manifest.content_of(name, directory)) as path:
            return load_alone(path, place, mapped=trust.map_weights)

    stored = artifact.read_program(
        directory, manifest, read_weights, lambda stored_on: wanted if stored_on.type == saved.type else stored_on
    )
    # Its numbers were checked when it was compiled.
    lowered, lowering = lower_rank(stored, backend, wanted, (), "structural", simulate=True)
    return _Part(stored, lowered, artifact.read_history(manifest, directory), lowering)


def check_ranks(directory: Path, rest: str, trust: artifact.Trust = artifact.NO_TRUST) -> None:
    """Refuse an artifact for several ranks outside a process group of that size.

    Args:
        rest: the command line after `lissom`.

    Raises:
        UnsupportedError: if it is refused.
        ArtifactError: if the directory is not an artifact.
    """
    manifest = read_directory(directory, lambda parsed: parsed.files, trust.keys)
    if manifest.backend == Distributed.name:
        _check_group(manifest, directory, rest)


def _check_group(manifest: Manifest, directory: Path, rest: str) -> None:
    world_size = _world_size(manifest)
    if in_group():
        check_world(world_size, f"'{directory}'", rest)
        return
    raise UnsupportedError(
        f"'{directory}' holds a model for {world_size} ranks, and this process is in no process group: run "
        f"`{torchrun(world_size, rest)}`, or a script of your own that torchrun starts"
    )


def check_world(world_size: int, what: str, rest: str) -> None:
    """Refuse a process group of another size.

    Args:
        rest: the command line after `lissom`.

    Raises:
        UnsupportedError: if it has another size.
    """
    world = torch.distributed.get_world_size()
    if world != world_size:
        raise UnsupportedError(
            f"{what} is for {world_size} ranks, and this process group has {world}: run `{torchrun(world_size, rest)}`"
        )


def _world_size(manifest: Manifest) -> int:
    world_size = manifest.options.get("world_size")
    if type(world_size) is not int or not 2 <= world_size <= MOST_RANKS:
        raise ArtifactError(
            f"the manifest of {manifest.name} is for {shown(world_size)} ranks, and a program is shared by 2 to {MOST_RANKS}; "
            f"save the model again"
        )
    return world_size
