"""One process per rank: each runs its part of a program that `partition` made, over `torch.distributed`.

A rank lowers and calls its program as the backend `eager` does, with its own weights. Collectives use a channel directly,
shared memory of ranks on one machine or a process group, and run in place where nothing else reads their argument. Ranks
compare their programs before they start, and their inputs before each call. A rank that ends or hangs makes the others raise.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import fx

from lissom.backends.base import Backend, Executable, state_of
from lissom.backends.distributed.channels import Channel
from lissom.backends.distributed.entry import Entry
from lissom.backends.distributed.ranks import Ranks, current_ranks, in_group
from lissom.backends.eager.backend import Eager, build_function, settle_weights
from lissom.backends.simulated_layers import SimulatedLayer, account, count_kernels, explain, refuse
from lissom.compiler.analysis.embedding_bounds import ShardedTable, outside_table, sharded_tables
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.collectives import ALL_GATHER, COLLECTIVES, WAIT
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.options import Checks
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.errors import InputError, LissomError, RankError, UnsupportedError
from lissom.version import __version__

MOST_RANKS = 1024
"""The largest number of ranks; a manifest that asks for more is refused before its files are listed."""
LONGEST_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Distributed(Backend):
    """Runs a program on several ranks, one process each: shared memory or gloo on CPUs, NCCL on CUDA devices.

    Attributes:
        world_size: how many ranks; None for as many as the process group has.
        timeout_seconds: how long a rank may not respond.
        shared_memory: whether ranks on one machine exchange values through shared memory instead of gloo.

    Raises:
        UnsupportedError: when a number is out of range.

    Examples:
        >>> import lissom
        >>> lissom.Distributed(world_size=2, shared_memory=False)
        Distributed(world_size=2, timeout_seconds=30.0, shared_memory=False)
    """

    world_size: int | None = None
    timeout_seconds: float = 30.0
    shared_memory: bool = True

    name: ClassVar[str] = "distributed"
    movable: ClassVar[bool] = True
    runs_ranks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.world_size is not None and not 2 <= self.world_size <= MOST_RANKS:
            raise UnsupportedError(f"world_size is {self.world_size}; a program is shared by 2 to {MOST_RANKS} ranks")
        if not 0 < self.timeout_seconds <= LONGEST_SECONDS:
            raise UnsupportedError(
                f"timeout_seconds is {self.timeout_seconds:g}; give seconds above 0, and at most {LONGEST_SECONDS:g}"
            )

    def lowering(self, device: torch.device) -> Sequence[Pass]:
        return Eager().lowering(device)

    def missing(self) -> str | None:
        if dist.is_available():
            return None
        return "backend 'distributed' needs torch.distributed, and this PyTorch was built without; choose backend 'eager'"

    def build(self, program: Program, example: Sample) -> Executable:
        """The executable of this rank; outside a process group one for all ranks, which cannot be called."""
        if isinstance(program, PartitionedProgram):
            return Held(program, len(program.ranks))
        if not in_group():
            return Held(program, self.world_size or 2)
        return RankProgram(program, program, current_ranks(self.timeout_seconds, self.shared_memory))

    def save_files(self, executable: Executable, folder: Path) -> None:
        """No files: the artifact has the program and the ranks' weights."""


def torchrun(world_size: int, rest: str) -> str:
    """The command that runs Lissom's command line on several ranks."""
    return f"torchrun --nproc-per-node {world_size} -m lissom {rest}"


class Held:
    """A program for several ranks in a process that is no rank: it can be inspected and saved.

    Attributes:
        history: of the passes.
    """

    def __init__(self, program: Program, world_size: int, history: History | None = None) -> None:
        self.stored = program
        self.history = history
        self.world_size = world_size

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        raise UnsupportedError(
            f"{self.stored.name} is compiled for {self.world_size} ranks, and this process is in no process group: save it, "
            f"and run `{torchrun(self.world_size, 'run DIRECTORY --input FILE')}`, or a script of your own that torchrun starts"
        )


class RankProgram:
    """The executable of one rank.

    Attributes:
        stored: its program before lowering, as an artifact holds it.
        history: of its passes.
    """

    def __init__(self, program: Program, stored: Program, ranks: Ranks, history: History | None = None) -> None:
        self.stored = stored
        self.history = history
        self.ranks = ranks
        self.world_size = ranks.world_size
        self.notes: Sequence[str] = ()
        self._program = program
        self._entry = Entry(ranks, program.name)
        # A sharded embedding yields zeros for indices out of range. On CUDA a check would synchronize the device.
        self._tables: Sequence[ShardedTable] = ()
        device = next((leaf.type.device for leaf in program.signature.tensors), torch.device("cpu"))
        if device.type == "cpu":
            self._tables = sharded_tables(stored)
        self._function = build_function(program, calls=_Collectives(ranks, ranks.channel(device), program.name).call_of)
        settle_weights(program)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[object]:
        with self.ranks.alone(self._program.name):
            self._entry.agree(inputs, next(filter(None, (table.outside(inputs) for table in self._tables)), None))
            try:
                return self._function(inputs)
            except (IndexError, RuntimeError) as error:
                sentence = outside_table(self._program, inputs)
                if sentence is None:
                    raise
                # All ranks have the same inputs and fail alike. A rank that does not is missed here, which ends the group.
                self.ranks.exchange(b"", self._program.name)
                raise InputError(sentence) from error

    @contextmanager
    def refusals(self) -> Generator[None]:
        """Tell the other ranks when the block raises, so that none waits for this one.

        Errors of the block pass through.

        Raises:
            RankError: when a rank ended or does not respond.
        """
        try:
            yield
        except RankError:
            raise
        except (LissomError, TypeError, ValueError, RuntimeError, IndexError) as error:
            with self.ranks.alone(self._program.name), suppress(InputError):
                self._entry.agree((), str(error) or type(error).__name__)
            raise

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's part of the state, by name."""
        return state_of(self._function)


class _Collectives:
    """Replacements of functional collectives: calls of a channel, which wait for the result."""

    def __init__(self, ranks: Ranks, channel: Channel, name: str) -> None:
        self.ranks = ranks
        self.channel = channel
        self.name = name

    def call_of(self, node: fx.Node) -> Callable[..., object] | None:
        if node.target is WAIT:
            return _itself
        if node.target not in COLLECTIVES:
            return None
        world_size, in_place = self.ranks.world_size, owns_argument(node)
        operation = "" if node.target is ALL_GATHER else str(nodes.argument(node, "reduce_op"))
        all_reduce, all_gather, reduce_scatter = map(
            self._refusing, (self.channel.reduce, self.channel.gather, self.channel.scatter)
        )

        def reduce(x: torch.Tensor, *_: object) -> torch.Tensor:
            x = x.contiguous() if in_place else x.clone(memory_format=torch.contiguous_format)
            all_reduce(x, operation)
            return x

        def gather(x: torch.Tensor, *_: object) -> torch.Tensor:
            gathered = x.new_empty((world_size * x.shape[0], *x.shape[1:]))
            all_gather(gathered, x.contiguous())
            return gathered

        def scatter(x: torch.Tensor, *_: object) -> torch.Tensor:
            scattered = x.new_empty((x.shape[0] // world_size, *x.shape[1:]))
            reduce_scatter(scattered, x.contiguous(), operation)
            return scattered

        calls: Mapping[object, Callable[..., object]] = dict(zip(COLLECTIVES, (reduce, gather, scatter), strict=True))
        return calls[node.target]

    def _refusing(self, collective: Callable[..., None]) -> Callable[..., None]:
        """A collective of the channel that raises RankError when a rank is gone."""

        def call(*operands: object) -> None:
            try:
                collective(*operands)
            except RuntimeError as error:
                self.ranks.fail(f"a rank of {self.name}", error)

        return call


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def owns_argument(node: fx.Node) -> bool:
    """True when a collective can overwrite its argument: it has no other readers, and is no view."""
    made = nodes.operand(node)
    if made.op != "call_function" or len(made.users) > 1 or not isinstance(made.target, torch._ops.OpOverload):
        return False
    return all(returned.alias_info is None for returned in made.target._schema.returns) and made.target is not WAIT


def lower_rank(
    program: Program, backend: Distributed, device: torch.device, samples: Sequence[Sample], checks: Checks, *, simulate: bool
) -> tuple[Program, History]:
    """One rank's lowered program and its history; passes are checked with stand-ins for collectives.

    Errors of the pipeline pass through.

    Raises:
        UnsupportedError: for quantized layers without a kernel, unless they are simulated.
    """
    lowering = Pipeline(backend.lowering(device), samples=samples, checks=checks)
    lowered, history = lowering.run(program, History("", checks))
    left: Sequence[SimulatedLayer] = explain(backend.simulated(lowered), history.steps)
    total = len(left) + count_kernels(lowered)
    if not simulate:
        refuse(backend.name, left, total)
    if total:
        history.note(account(left, total))
    return lowered, history


def append_steps(history: History, further: History) -> History:
    """A history followed by the steps of another, without its first step, the program it started from."""
    joined = replace(history, steps=[*history.steps], texts=[*history.texts], changes={**history.changes})
    for index, (step, text) in enumerate(zip(further.steps[1:], further.texts[1:], strict=True), 1):
        facts = further.facts_of(index) if index in further.changes else None
        joined.record(replace(step, index=len(joined.steps)), text, facts)
    return joined


def facts_of(stored: Program, lowered: Program) -> dict[str, str]:
    """Facts that must agree between ranks before they run, by name.

    The collectives of the lowered program are compared too, since lowering may depend on a rank's weights.
    """
    types = [f"{node.target} {node.args[1:]} {nodes.tensor_type(node).shape}" for node in lowered.nodes(*COLLECTIVES)]
    return versions() | {
        "the program, by a checksum": _checksum(stored.text()),
        "what they communicate, by a checksum": _checksum("\n".join(types)),
    }


def versions() -> dict[str, str]:
    """The versions that must agree between ranks."""
    return {"the version of Lissom": __version__, "the version of PyTorch": str(torch.__version__)}


def _checksum(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
