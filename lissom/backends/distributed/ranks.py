"""The processes that run one program together: what they tell each other beside it, and what ends them when one is gone.

They talk over groups of their own, so that how long they wait is their own too, and what ends them leaves the caller's groups
as they were. Over gloo a rank that died is noticed at once, since its connections close, and one that stands still when
nothing came from it for so many seconds. NCCL's own watchdog does the same for what runs on CUDA.
"""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
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

Found = TypeVar("Found")

_BEAT_SECONDS = 0.5
"""How often a rank that is busy says that it is alive."""
_PATIENT = timedelta(days=7)
"""No work takes longer; what ends a wait before is a rank that does not say that it is alive."""


class Ranks:
    """This process and those it runs programs with: all of the default process group.

    rank, world_size: this one's number, and how many there are. timeout_seconds: how long one may not answer. shares_memory:
    whether values go through memory that ranks share, where all are processes of one machine.

    Raises: RankError when the others do not make theirs within that time.
    """

    def __init__(self, timeout_seconds: float, shares_memory: bool = True) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.timeout_seconds = timeout_seconds
        self.shares_memory = shares_memory
        self._failure: str | None = None
        self._channels: dict[str, Channel] = {}
        self._running = RLock()
        self._calls = self._programs = 0
        self._heard = {rank: 0.0 for rank in range(self.world_size) if rank != self.rank}
        self._control: Any = None
        with self.answering("this process group"):
            self._control = self._group("gloo")
            self._store = self._control.get_group_store()

    def _group(self, backend: str) -> Any:
        return dist.new_group(backend=backend, timeout=timedelta(seconds=self.timeout_seconds))

    def channel(self, device: torch.device) -> Channel:
        """What carries values on the device; every rank asks for it at the same point."""
        with self.answering("this process group"):
            if device.type not in self._channels:
                memory = self._share_memory() if device.type == "cpu" and self.shares_memory else None
                self._channels[device.type] = memory or GroupChannel(self._group("nccl" if device.type == "cuda" else "gloo"))
        return self._channels[device.type]

    def _share_memory(self) -> SharedMemory | None:
        """Memory that all ranks see; None where they are not on one machine, or one cannot have it. Raises: RankError."""
        who = "this process group"
        mine = {"machine": "" if load_kernels() else machine(), "process": os.getpid()}
        told = [json.loads(item) for item in self._exchange_json(mine, who, patient=False)]
        if not mine["machine"] or any(item["machine"] != mine["machine"] for item in told):
            return None
        with ExitStack() as stack:
            path, found = b"", None
            if self.rank == 0:
                with suppress(OSError):
                    path = os.fsencode(stack.enter_context(create(self.world_size)))
            first, *_ = self.exchange(path, who)
            with suppress(OSError):
                memory, numbers = attach(Path(os.fsdecode(first))), [item["process"] for item in told]
                found = SharedMemory(memory, self.rank, self.world_size, numbers, self.timeout_seconds)
            everyone = all(self.exchange(b"" if found is None else b"has it", who))
        return found if everyone else None

    @contextmanager
    def answering(self, who: str) -> Generator[None]:
        """Say in a sentence of ours what torch says when a rank does not answer. Raises: RankError."""
        if self._failure:
            raise RankError(self._failure)
        try:
            yield
        except RuntimeError as error:
            self.fail(f"a rank of {who}", error)

    def fail(self, what: str, cause: Exception | None = None) -> NoReturn:
        """End the work of all ranks that can be reached; from now on every call here raises. Raises: RankError."""
        self.end(
            f"{what} ended or did not answer within {self.timeout_seconds:g} s; see what the other ranks say, "
            f"and start all of them again",
            cause,
        )

    def end(self, sentence: str, cause: Exception | None = None) -> NoReturn:
        """As `fail`, with a sentence that says why. Raises: RankError."""
        self._end(sentence)
        raise RankError(self._failure) from cause

    def _end(self, sentence: str) -> None:
        if self._failure is not None:
            return
        self._failure = sentence
        atexit.register(_leave)
        # Those that wait for this rank notice it now, and not when their own time is over.
        for channel in self._channels.values():
            channel.end()
        control, self._control = self._control, None
        if control is not None:
            end_group(control)

    def next_program(self) -> int:
        """The number of the next program that these ranks run."""
        self._programs += 1
        return self._programs

    def next_call(self) -> int:
        """The number of the next call that these ranks make."""
        self._calls += 1
        return self._calls

    @contextmanager
    def alone(self, who: str) -> Generator[None]:
        """Work that the ranks do together, by one thread of this rank at a time. who: the name of what they run.

        What stops this rank and is none of our errors, an interrupt for one, ends the others' wait.

        Raises: UnsupportedError when another thread is at it.
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
        """As `alone`, and tell the others that this rank is alive while they wait for what it makes."""
        stop = Event()

        def beat() -> None:
            counts = dict.fromkeys(self._heard, -1)
            while not stop.is_set():
                # The process that keeps the store may be gone, or stand still: then no rank is heard of.
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
                # It may hang on a store that does not answer.
                thread.join(2 * _BEAT_SECONDS)

    def exchange(self, data: bytes, who: str, *, patient: bool = False) -> list[bytes]:
        """What every rank gives, in their order; all call it at the same point. who: the name of what they run.

        patient: wait as long as the others say that they are alive, in a block of `working`.

        Raises: RankError when one ended or does not answer.
        """
        with self.answering(who):
            length = torch.tensor([len(data)])
            lengths = [int(item) for item in self._gather(length, who, patient)]
            longest = torch.zeros(max(1, *lengths), dtype=torch.uint8)
            if data:
                longest[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            parts = self._gather(longest, who, patient)
        return [bytes(part[:size].numpy()) for part, size in zip(parts, lengths, strict=True)]

    def _gather(self, tensor: torch.Tensor, who: str, patient: bool) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        options = c10d.AllgatherOptions()
        if patient:
            options.timeout = _PATIENT
        work = self._control.allgather([found], [tensor], options)
        if patient:
            self._watch(work, who)
        work.wait()
        return found

    def _watch(self, work: Any, who: str) -> None:
        """Wait for the work as long as all ranks say that they are alive. Raises: RankError."""
        since = looked = time.monotonic()
        while not work.is_completed():
            time.sleep(0.001)
            now = time.monotonic()
            # A pause of this process is none of the others.
            since = now if now - looked > 2 * _BEAT_SECONDS else since
            looked = now
            for rank, heard in self._heard.items():
                if now - max(since, heard) > self.timeout_seconds:
                    self.fail(f"rank {rank} of {who}")

    def send(self, tensor: torch.Tensor, rank: int, who: str) -> None:
        """Give a rank a contiguous tensor on the CPU that it takes with `receive`. Raises: RankError."""
        if tensor.numel():
            with self.answering(who):
                self._control.send([tensor.reshape(-1).view(torch.uint8)], rank, 0).wait()

    def receive(self, tensor: torch.Tensor, rank: int, who: str) -> None:
        """Fill a tensor with what a rank sends. Raises: RankError."""
        if tensor.numel():
            with self.answering(who):
                self._control.recv([tensor.view(-1).view(torch.uint8)], rank, 0).wait()

    def agree(self, facts: Mapping[str, str], who: str, *, patient: bool = False) -> None:
        """Compare facts of all ranks. facts: what each is by what it is called.

        Raises: RankError when they differ, on all of them the same sentence.
        """
        _compare([json.loads(part) for part in self._exchange_json(facts, who, patient)], who)

    def _exchange_json(self, data: object, who: str, patient: bool) -> list[bytes]:
        return self.exchange(json.dumps(data).encode(), who, patient=patient)

    def settle(self, make: Callable[[], Found], who: str, tell: Callable[[Found], Mapping[str, str]] = lambda _: {}) -> Found:
        """What `make` gives on this rank, once it gave something on all; they wait for each other as long as they are alive.

        tell: facts of it, which are to be the same on all, as for `agree`.

        Raises: where it failed on one, that rank's error, on all of them, as the same sentence; RankError.
        """
        found, failed = attempt(make)
        outcomes = self._exchange_json(failed or {"told": tell(cast(Found, found))}, who, patient=True)
        _compare(raise_first(outcomes), who)
        return cast(Found, found)

    def from_first(self, make: Callable[[], bytes], who: str) -> bytes:
        """What rank 0 makes, on all ranks. Raises: rank 0's error, on all of them as the same sentence; RankError."""
        data, failed = attempt(make) if self.rank == 0 else (b"", None)
        first, *_ = self.exchange((b"\0" + json.dumps(failed).encode()) if failed else (data or b""), who, patient=True)
        if first.startswith(b"\0"):
            raise_first([first[1:]])
        return first

    def share_directory(self, write: Callable[[Callable[[Path], None]], None], own: Callable[[Path], None], who: str) -> None:
        """Let rank 0 write a directory, and every rank its share of it, until all of it is there.

        write: what rank 0 does; it calls what it is given with the directory, once that is there. own: a rank's share, which
        fails on all ranks or on none.

        Raises: what fails, on all ranks as the same sentence; RankError.
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
                # Rank 0 has it too, and says it when it has put away what it wrote.
                except LissomError:
                    pass
            self.from_first(lead, who)


def _leave() -> None:
    """Leave the groups before the process ends: gloo's threads abort it else, where one of its connections is broken."""
    if dist.is_initialized() and dist.get_backend() == "gloo":
        with suppress(RuntimeError):
            dist.destroy_process_group()


def attempt(make: Callable[[], Found]) -> tuple[Found | None, dict[str, str] | None]:
    """What a function gives, or the error it raises as JSON can hold it."""
    try:
        return make(), None
    except RankError:
        raise
    except LissomError as error:
        return None, {"error": type(error).__name__, "sentence": str(error)}
    except OSError as error:
        return None, {"error": "ArtifactError", "sentence": str(error)}


def _compare(found: Sequence[Mapping[str, str]], who: str) -> None:
    """Raises: RankError where a fact of one rank is another than that of the first."""
    for name, mine in found[0].items():
        for rank, other in enumerate(found):
            if other.get(name) != mine:
                raise RankError(
                    f"the ranks of {who} differ in {name}: {mine} on rank 0, {other.get(name)} on rank {rank}; "
                    f"give all ranks the same"
                )


def raise_first(outcomes: Sequence[bytes]) -> list[dict[str, str]]:
    """What ranks told of what they made. Raises: the error of the first that failed."""
    found = [json.loads(item) for item in outcomes]
    for item in found:
        if "error" in item:
            kind = getattr(errors, item["error"], LissomError)
            raise kind(item["sentence"])
    return [item["told"] for item in found]


_KNOWN: list[tuple[object, Ranks]] = []


def current_ranks(timeout_seconds: float, shares_memory: bool = True) -> Ranks:
    """The ranks of the default process group, which is up; made once for each time they wait, and for each way to share."""
    world, wanted = dist.group.WORLD, (timeout_seconds, shares_memory)
    for group, ranks in _KNOWN:
        if group is world and (ranks.timeout_seconds, ranks.shares_memory) == wanted and ranks._failure is None:
            return ranks
    ranks = Ranks(*wanted)
    # Those of a group that is gone are of no use any more.
    _KNOWN[:] = [(group, known) for group, known in _KNOWN if group is world]
    _KNOWN.append((world, ranks))
    return ranks


def in_group() -> bool:
    """True in a process that is one rank of a process group."""
    return dist.is_available() and dist.is_initialized()
