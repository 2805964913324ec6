"""The ranks that run one program together: how they exchange metadata, and how all end when one is gone.

They use process groups of their own, with their own timeout, so that a failure leaves the caller's groups intact. Over gloo a
rank that died is noticed at once, since its connections close, and one that hangs after the timeout. NCCL's own watchdog does
the same for collectives on CUDA.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from threading import Event, RLock, Thread
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from lissom import errors
from lissom.backends.distributed.channels import Channel, GroupChannel, SharedMemory, attach, create, end_group, machine
from lissom.errors import LissomError, RankError, UnsupportedError
from lissom.ops.native import load_kernels

Result = TypeVar("Result")

_BEAT_SECONDS = 0.5
"""Seconds between two heartbeats of a busy rank."""
_PATIENT = timedelta(days=7)
"""The longest wait; a wait ends earlier when a rank sends no heartbeat."""


class Ranks:
    """The ranks that run programs together: all of the default process group.

    Attributes:
        rank: this rank.
        world_size: the number of ranks.
        timeout_seconds: how long a rank may not respond.
        shares_memory: whether values go through shared memory where all ranks are on one machine.

    Raises:
        RankError: when the other ranks do not construct theirs within that time.
    """

    def __init__(self, timeout_seconds: float, shares_memory: bool = True) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.timeout_seconds = timeout_seconds
        self.shares_memory = shares_memory
        self._failure: str | None = None
        self._channels: dict[str, Channel] = {}
        self._running = RLock()
        # The numbers of the programs that these ranks run, and of their calls.
        self.next_program, self.next_call = count(1).__next__, count(1).__next__
        self._heard = {rank: 0.0 for rank in range(self.world_size) if rank != self.rank}
        self._control: Any = None
        with self.answering("this process group"):
            self._control = self._group("gloo")
            self._store = self._control.get_group_store()

    def _group(self, backend: str) -> Any:
        return dist.new_group(backend=backend, timeout=timedelta(seconds=self.timeout_seconds))

    def channel(self, device: torch.device) -> Channel:
        """The channel for values on a device; all ranks request it at the same point."""
        with self.answering("this process group"):
            if device.type not in self._channels:
                memory = self._share_memory() if device.type == "cpu" and self.shares_memory else None
                self._channels[device.type] = memory or GroupChannel(self._group("nccl" if device.type == "cuda" else "gloo"))
        return self._channels[device.type]

    def _share_memory(self) -> SharedMemory | None:
        """Shared memory of all ranks; None where they are on several machines, or it cannot be created. Raises RankError."""
        who = "this process group"
        mine = {"machine": "" if load_kernels() else machine(), "process": os.getpid()}
        told = self._exchange_json(mine, who)
        if not mine["machine"] or any(peer["machine"] != mine["machine"] for peer in told):
            return None
        with ExitStack() as stack:
            path, shared = b"", None
            if self.rank == 0:
                with suppress(OSError):
                    path = os.fsencode(stack.enter_context(create(self.world_size)))
            first, *_ = self.exchange(path, who)
            with suppress(OSError):
                memory, numbers = attach(Path(os.fsdecode(first))), [peer["process"] for peer in told]
                shared = SharedMemory(memory, self.rank, self.world_size, numbers, self.timeout_seconds)
            everyone = all(self.exchange(b"" if shared is None else b"has it", who))
        return shared if everyone else None

    @contextmanager
    def answering(self, who: str) -> Generator[None]:
        """Convert torch's errors about ranks that do not respond. Raises RankError."""
        if self._failure:
            raise RankError(self._failure)
        try:
            yield
        except RuntimeError as error:
            self.fail(f"a rank of {who}", error)

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        """Abort all ranks; from now on every call here raises. Raises RankError."""
        self.end(
            f"{what} ended or did not answer within {self.timeout_seconds:g} s; see what the other ranks say, "
            f"and start all of them again",
            cause,
        )

    def end(self, sentence: str, cause: Exception | None = None) -> NoReturn:
        """As `fail`, with a message of the caller's. Raises RankError."""
        self._end(sentence)
        raise RankError(self._failure) from cause

    def _end(self, sentence: str) -> None:
        if self._failure is not None:
            return
        self._failure = sentence
        atexit.register(_leave)
        # Ranks that wait for this one notice it now, and not after their timeout.
        for channel in self._channels.values():
            channel.end()
        held, self._control = [self._control], None
        if held[0] is not None:
            end_group(held)

    @contextmanager
    def alone(self, who: str) -> Generator[None]:
        """Collective work, by one thread of this rank at a time.

        An error that is not Lissom's own, such as an interrupt, aborts the other ranks, which would wait otherwise.

        Args:
            who: the name of what they run.

        Raises:
            UnsupportedError: when another thread is in such a block.
        """
        if not self._running.acquire(blocking=False):
            raise UnsupportedError(
                f"{who} was called while another thread of this rank runs a call with the other ranks; all ranks make their "
                f"calls in the same order, so make them one after the other, from one thread"
            )
        try:
            yield
        except LissomError:
            raise
        except BaseException:
            self._end(f"{who} was stopped on this rank while the other ranks waited for it; start all of them again")
            raise
        finally:
            self._running.release()

    @contextmanager
    def working(self, who: str) -> Generator[None]:
        """As `alone`, and send heartbeats to ranks that wait for this one."""
        stop = Event()

        def beat() -> None:
            counts = dict.fromkeys(self._heard, -1)
            while not stop.is_set():
                # The process of the store may be gone or hang; then no heartbeats arrive.
                with suppress(RuntimeError):
                    self._store.add(f"beat/{self.rank}", 1)
                    for rank, before in counts.items():
                        counts[rank] = self._store.add(f"beat/{rank}", 0)
                        if counts[rank] != before:
                            self._heard[rank] = time.monotonic()
                stop.wait(_BEAT_SECONDS)

        thread = Thread(target=beat, daemon=True)
        with self.alone(who):
            thread.start()
            try:
                yield
            finally:
                stop.set()
                # It may hang on a store that does not respond.
                thread.join(2 * _BEAT_SECONDS)

    def exchange(self, data: bytes, who: str, *, patient: bool = False) -> list[bytes]:
        """All-gather bytes, in rank order; all ranks call it at the same point.

        Args:
            who: the name of what they run.
            patient: wait as long as the others send heartbeats, in a block of `working`.

        Raises:
            RankError: when a rank ended or does not respond.
        """
        with self.answering(who):
            length = torch.tensor([len(data)])
            lengths = [int(number) for number in self._gather(length, who, patient)]
            longest = torch.zeros(max(1, *lengths), dtype=torch.uint8)
            if data:
                longest[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            parts = self._gather(longest, who, patient)
        return [bytes(part[:size].numpy()) for part, size in zip(parts, lengths, strict=True)]

    def _gather(self, tensor: torch.Tensor, who: str, patient: bool) -> list[torch.Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        options = c10d.AllgatherOptions()
        if patient:
            options.timeout = _PATIENT
        work = self._control.allgather([gathered], [tensor], options)
        if patient:
            self._watch(work, who)
        work.wait()
        return gathered

    def _watch(self, work: Any, who: str) -> None:
        """Wait for the work as long as all ranks send heartbeats. Raises RankError."""
        since = looked = time.monotonic()
        while not work.is_completed():
            time.sleep(0.001)
            now = time.monotonic()
            # A pause of this process is not one of the others.
            since = now if now - looked > 2 * _BEAT_SECONDS else since
            looked = now
            for rank, heard in self._heard.items():
                if now - max(since, heard) > self.timeout_seconds:
                    self.fail(f"rank {rank} of {who}")

    def send(self, tensor: torch.Tensor, rank: int, who: str) -> None:
        """Send a contiguous CPU tensor to a rank, which calls `receive`. Raises RankError."""
        if tensor.numel():
            with self.answering(who):
                self._control.send([tensor.reshape(-1).view(torch.uint8)], rank, 0).wait()

    def receive(self, tensor: torch.Tensor, rank: int, who: str) -> None:
        """Receive a tensor from a rank, in place. Raises RankError."""
        if tensor.numel():
            with self.answering(who):
                self._control.recv([tensor.view(-1).view(torch.uint8)], rank, 0).wait()

    def agree(self, facts: Mapping[str, str], who: str, *, patient: bool = False) -> None:
        """Compare facts between ranks.

        Args:
            facts: values by name.

        Raises:
            RankError: when they differ, with the same message on all ranks.
        """
        _compare(self._exchange_json(facts, who, patient), who)

    def _exchange_json(self, data: object, who: str, patient: bool = False) -> list[Any]:
        return [json.loads(part) for part in self.exchange(json.dumps(data).encode(), who, patient=patient)]

    def settle(
        self, make: Callable[[], Result], who: str, tell: Callable[[Result], Mapping[str, str]] = lambda _: {}
    ) -> Result:
        """The result of `make` on this rank, once it succeeded on all; ranks wait for each other as long as they are alive.

        Where it failed on a rank, that error is raised on all, with the same message.

        Args:
            tell: facts of the result that must agree, as in `agree`.

        Raises:
            RankError: when facts differ, or a rank ended.
        """
        made, failed = _attempt(make)
        outcomes = self._exchange_json(failed or {"told": tell(cast(Result, made))}, who, patient=True)
        _compare(_raise_first(outcomes), who)
        return cast(Result, made)

    def from_first(self, make: Callable[[], bytes], who: str) -> bytes:
        """Broadcast the result of `make` on rank 0. Raises rank 0's error, with the same message on all ranks; RankError."""
        data, failed = _attempt(make) if self.rank == 0 else (b"", None)
        first, *_ = self.exchange((b"\0" + json.dumps(failed).encode()) if failed else (data or b""), who, patient=True)
        if first.startswith(b"\0"):
            _raise_first([json.loads(first[1:])])
        return first

    def share_directory(self, write: Callable[[Callable[[Path], None]], None], own: Callable[[Path], None], who: str) -> None:
        """Write a directory together: rank 0 creates it, and every rank writes its part.

        An error is raised on all ranks, with the same message.

        Args:
            write: runs on rank 0, and calls its argument with the directory once that exists.
            own: writes a rank's part; it fails on all ranks or on none.

        Raises:
            RankError: when a rank ended or does not respond.
        """

        def enter(folder: Path) -> None:
            self.from_first(lambda: os.fsencode(folder), who)
            own(folder)

        def lead() -> bytes:
            write(enter)
            return b""

        with self.working(who):
            if self.rank:
                folder = self.from_first(lead, who)
                try:
                    own(Path(os.fsdecode(folder)))
                except RankError:
                    raise
                # Rank 0 has the error too, and raises it after it has removed its files.
                except LissomError:
                    pass
            self.from_first(lead, who)


def _leave() -> None:
    """Destroy the groups before the process ends; otherwise gloo's threads abort it when a connection is broken."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        with suppress(RuntimeError):
            dist.destroy_process_group()


def _attempt(make: Callable[[], Result]) -> tuple[Result | None, dict[str, str] | None]:
    """The result of a function, or the error it raises in a form for JSON."""
    try:
        return make(), None
    except RankError:
        raise
    except (LissomError, OSError) as error:
        name = "ArtifactError" if isinstance(error, OSError) else type(error).__name__
        return None, {"error": name, "sentence": str(error)}


def _compare(facts: Sequence[Mapping[str, str]], who: str) -> None:
    """Raise RankError where a fact of a rank differs from that of rank 0."""
    for name, mine in facts[0].items():
        for rank, other in enumerate(facts):
            if other.get(name) != mine:
                raise RankError(
                    f"the ranks of {who} differ in {name}: {mine} on rank 0, {other.get(name)} on rank {rank}; "
                    f"give all ranks the same"
                )


def _raise_first(outcomes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The facts of all ranks. Raises the error of the first rank that failed."""
    for outcome in outcomes:
        if "error" in outcome:
            raise getattr(errors, outcome["error"], LissomError)(outcome["sentence"])
    return [outcome["told"] for outcome in outcomes]


_KNOWN: list[tuple[object, Ranks]] = []


def current_ranks(timeout_seconds: float, shares_memory: bool = True) -> Ranks:
    """The ranks of the default process group, which must be initialized; cached per arguments."""
    world, wanted = dist.group.WORLD, (timeout_seconds, shares_memory)
    for group, ranks in _KNOWN:
        if group is world and (ranks.timeout_seconds, ranks.shares_memory) == wanted and ranks._failure is None:
            return ranks
    ranks = Ranks(*wanted)
    # Entries of a destroyed group are dropped.
    _KNOWN[:] = [(group, known) for group, known in _KNOWN if group is world]
    _KNOWN.append((world, ranks))
    return ranks


def in_group() -> bool:
    """True in a process that is one rank of a process group."""
    return dist.is_available() and dist.is_initialized()
