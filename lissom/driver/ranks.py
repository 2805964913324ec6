"""Compile for several ranks: rank 0 captures the model, runs the passes, and scatters the shards.

Each other rank receives the shared program and its own weights, so all ranks run the same program. Each rank lowers its own
program, and the collectives of the lowered programs are compared. Outside a process group the program is made and held.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lissom.artifacts.program_file import decode_program, encode_program
from lissom.artifacts.rank_files import check_world
from lissom.artifacts.values import decode_named
from lissom.artifacts.weights import read_weights, stored_weights
from lissom.backends.base import Backend, Executable
from lissom.backends.distributed.backend import Distributed, Held, RankProgram, append_steps, facts_of, lower_rank, versions
from lissom.backends.distributed.ranks import Ranks, current_ranks, in_group
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.options import Checks
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.training.ranks import one_process
from lissom.errors import UnsupportedError
from lissom.passes.parallel.partition import Partition
from lissom.passes.parallel.shard import Shard

Made = TypeVar("Made")
Unlowered = tuple[Program, History, Sequence[Sample]]
"""A program before lowering, its history, and the verification inputs for lowering it."""

_MODEL = "the model"


@dataclass(frozen=True)
class PartitionedModel:
    """A program partitioned for several ranks, its history, and the verification inputs for lowering it."""

    program: PartitionedProgram
    history: History
    samples: Sequence[Sample]


@dataclass(frozen=True)
class RankModel:
    """The model of one process.

    Attributes:
        program: for inspection.
        history: of every step that made it.
    """

    program: Program
    executable: Executable
    history: History


def with_world_size(backend: str | Backend, world_size: int | None) -> str | Backend:
    """The backend with its world size set. Raises UnsupportedError if it takes none, or has another."""
    if world_size is None:
        return backend
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 2:
        raise UnsupportedError(f"world_size= is {world_size!r:.80}; give the number of ranks that share the model, 2 or more")
    if isinstance(backend, str) and backend == Distributed.name:
        return Distributed(world_size)
    if not isinstance(backend, Distributed):
        name = getattr(backend, "name", backend)
        raise UnsupportedError(
            f"world_size={world_size} goes with backend='distributed', and backend is '{name}'; leave one of them out"
        )
    if backend.world_size not in (None, world_size):
        raise UnsupportedError(f"world_size is {world_size}, and the backend's is {backend.world_size}; give the number once")
    return replace(backend, world_size=world_size)


def passes_for(backend: Distributed, passes: Sequence[Pass]) -> tuple[list[Pass], Distributed]:
    """The passes with `shard` and `partition` appended unless they are there, and the backend with its world size.

    Raises:
        UnsupportedError: if the world size is not given, or given twice with different values.
    """
    planned = next((pass_.world_size for pass_ in passes if isinstance(pass_, Shard)), None)
    if None not in (planned, backend.world_size) and planned != backend.world_size:
        raise UnsupportedError(
            f"world_size is {backend.world_size}, and the passes have shard{{world_size={planned}}}; give the number once"
        )
    world_size = planned or backend.world_size or (torch.distributed.get_world_size() if in_group() else None)
    if world_size is None:
        raise UnsupportedError("backend 'distributed' needs the number of ranks where there is no process group: world_size=2")
    if in_group():
        check_world(world_size, _MODEL, "...")
    if world_size < 2:
        raise UnsupportedError(
            "this process group has one rank, and a program is sharded across 2 or more; choose backend 'eager'"
        )
    ending: list[Pass] = [] if planned else [Shard(world_size)]
    if any(isinstance(pass_, Partition) for pass_ in passes):
        return [*passes], replace(backend, world_size=world_size)
    return [*passes, *ending, Partition()], replace(backend, world_size=world_size)


def on_all_ranks(backend: Distributed, make: Callable[[], Made]) -> Made:
    """The result of `make`; in a process group it returns after `make` succeeded on every rank.

    What it raises on one rank is raised on all.

    Raises:
        RankError: if a rank ended or does not answer.
    """
    if not in_group():
        return make()
    ranks = current_ranks(backend.timeout_seconds, backend.shared_memory)
    with ranks.working(_MODEL):
        return ranks.settle(make, _MODEL)


def compile_for_ranks(
    make: Callable[[], Unlowered], backend: Distributed, device: torch.device, *, checks: Checks, simulate: bool
) -> RankModel:
    """This rank's shard of the model that `make` gives on rank 0; outside a process group all shards.

    What `make` or a rank's lowering raises on one rank is raised on every rank.

    Args:
        device: of this rank.

    Raises:
        RankError: when one ended or does not answer.
    """
    if not in_group():
        model = _checked(*make(), backend)
        # All ranks have the same graph, so this shows whether the program can be lowered.
        lower_rank(model.program.of_rank(0), backend, device, model.samples, checks, simulate=simulate)
        return RankModel(model.program, Held(model.program, len(model.program.ranks), model.history), model.history)
    ranks = current_ranks(backend.timeout_seconds, backend.shared_memory)
    with ranks.working(_MODEL):
        ranks.agree(versions() | {"the number of ranks": str(backend.world_size)}, _MODEL)
        stored, history, samples = _scatter(lambda: _checked(*make(), backend), ranks, device)
        lowered, lowering = ranks.settle(
            lambda: lower_rank(stored, backend, device, samples, checks, simulate=simulate),
            stored.name,
            tell=lambda outcome: facts_of(stored, outcome[0]),
        )
        executable = RankProgram(lowered, stored, ranks, history)
    return RankModel(lowered, executable, append_steps(history, lowering))


def _checked(program: Program, history: History, samples: Sequence[Sample], backend: Distributed) -> PartitionedModel:
    if not isinstance(program, PartitionedProgram) or len(program.ranks) != backend.world_size:
        raise UnsupportedError(
            f"{program.name} cannot be sharded across {backend.world_size} ranks: `shard` shards none of its weights; "
            f"choose backend 'eager'"
        )
    return PartitionedModel(program, history, samples)


def _scatter(make: Callable[[], PartitionedModel], ranks: Ranks, device: torch.device) -> Unlowered:
    """This rank's program, its history so far, and the samples; rank 0 makes them and scatters the shards."""
    made: list[PartitionedModel] = []

    def first() -> bytes:
        # The other ranks wait, so passes that train do not share their work.
        with one_process():
            made.append(make())
        model = made[0]
        header = {
            "program": encode_program(model.program.of_rank(0), {}),
            "history": model.history.to_json(),
            "texts": model.history.texts,
        }
        return json.dumps(header).encode()

    header = json.loads(ranks.from_first(first, _MODEL))
    name = str(header["program"]["name"])
    received: list[dict[str, torch.Tensor]] = []
    for turn in range(1, ranks.world_size):
        # One rank after the other, so that no rank waits for a tensor longer than sending it takes.
        ranks.exchange(b"", name, patient=True)
        if ranks.rank == 0:
            _send_part(made[0], ranks, turn)
        elif ranks.rank == turn:
            received = _receive_tensors(ranks, name)
    if ranks.rank == 0:
        model = made.pop()
        return _owned(model.program.of_rank(0)), model.history, model.samples
    weights, *samples = received
    history = History.from_json(header["history"], header["texts"])
    return _decode(header["program"], weights, device), history, [[*sample.values()] for sample in samples]


def _send_part(model: PartitionedModel, ranks: Ranks, rank: int) -> None:
    """Send a rank its weights with their entries, and the samples."""
    entries, tensors = stored_weights(model.program.of_rank(rank))
    note = torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)
    samples = [{f"{index:04}": tensor for index, tensor in enumerate(sample)} for sample in model.samples]
    _send_tensors([{_ENTRIES: note, **tensors}, *samples], ranks, rank, model.program.name)


_ENTRIES = ":entries"


def _send_tensors(groups: Sequence[dict[str, torch.Tensor]], ranks: Ranks, rank: int, who: str) -> None:
    """Send named tensors: first their shapes and dtypes, then one tensor at a time, so that none is in memory twice."""
    described = [
        {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in group.items()} for group in groups
    ]
    head = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    ranks.send(torch.tensor([head.numel()]), rank, who)
    ranks.send(head, rank, who)
    for group in groups:
        for tensor in group.values():
            ranks.send(tensor.detach().cpu().contiguous(), rank, who)


def _receive_tensors(ranks: Ranks, who: str) -> list[dict[str, torch.Tensor]]:
    """The named tensors that rank 0 sends."""
    length = torch.zeros(1, dtype=torch.int64)
    ranks.receive(length, 0, who)
    head = torch.zeros(int(length), dtype=torch.uint8)
    ranks.receive(head, 0, who)
    groups: list[dict[str, torch.Tensor]] = []
    for group in json.loads(head.numpy().tobytes()):
        tensors = {name: torch.empty(shape, dtype=decode_named("dtype", kind)) for name, (kind, *shape) in group.items()}
        for tensor in tensors.values():
            ranks.receive(tensor, 0, who)
        groups.append(tensors)
    return groups


def _decode(data: dict[str, Any], weights: dict[str, torch.Tensor], device: torch.device) -> Program:
    """The program that rank 0 encoded, with this rank's weights, on this rank's device."""
    entries = json.loads(weights.pop(_ENTRIES).numpy().tobytes())
    return decode_program(
        data,
        lambda _, place: read_weights(entries, weights.__getitem__, place),
        lambda stored_on: device if stored_on.type == device.type else stored_on,
    )


def _owned(program: Program) -> Program:
    """The program with copies in place of views of the whole model's weights, so that these can be freed."""
    made: dict[object, torch.Tensor] = {}
    for name, weight in program.weights().items():
        if weight.untyped_storage().nbytes() <= weight.nbytes:
            continue
        key = (weight.data_ptr(), weight.dtype, weight.shape, weight.stride())
        copied = made.setdefault(key, weight.detach().clone())
        program.set_weight(name, nn.Parameter(copied, requires_grad=weight.requires_grad) if _trains(weight) else copied)
    return program


def _trains(weight: torch.Tensor) -> bool:
    return isinstance(weight, nn.Parameter)
