"""The state of a training run in a directory, from which the same run goes on after its process was killed.

`state.json` names the file of tensors that belongs to it, and is replaced last, so that a kill at any moment leaves the state
before or the state after. Tensors are in safetensors files; nothing is pickled. With sharded weights every rank writes its own.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lissom.compiler.ir.editor import CurvePoint
from lissom.compiler.training.gradients import LossScale
from lissom.compiler.training.ranks import Ranks
from lissom.errors import ArtifactError
from lissom.io.fields import count, optional, parse_json, printable, shown, take, take_list
from lissom.io.files import check_path, open_plain, read_plain, reason, write_whole, writing_whole
from lissom.io.tensor_files import DTYPES, write_tensors

FORMAT_VERSION = 1
STATE = "state.json"
WEIGHT, BEST, FIRST, SECOND = "weight/", "best/", "first-moment/", "second-moment/"
"""The names of tensors begin so: the weights, the best ones so far, and the moments of AdamW."""
ORDER_GENERATOR, GLOBAL_GENERATOR = "order-generator", "global-generator"
_TENSORS = re.compile(r"(step-\d{1,18}|result)(-rank-\d{1,6})?\.safetensors")
_NOTE = {"lissom": "training"}
_HEADER = json.dumps({"__metadata__": {"format": "pt", **_NOTE}}, separators=(",", ":"))[:-2].encode()
"""The beginning of the header in each of our files of tensors; other programs may write files of the same names."""
_TEMPORARY = re.compile(r"\.lissom-[0-9a-f]{16}")
_MOST_BYTES = 64 << 20
_COST = 25
"""A state is written again after so many times the seconds that writing it took: at most 4 % of the time."""
_SECONDS = 30.0
"""A state is written so often between two measurements of the held-out loss."""


@dataclass(frozen=True)
class State:
    """The progress of a run, without its tensors.

    Attributes:
        step: the number of finished steps.
        seconds: used so far.
        precision: of products.
        order: the batches that are left of this pass over the data, the last one next.
        recent: the losses since the last measurement.
        updates: AdamW's steps by parameter, without those that never had a gradient.
        stopped: why a finished run ended early.
        slowed: the step at which it went back to the start, or None.
        scale: of losses in float16.
    """

    step: int
    seconds: float
    precision: str
    order: list[int]
    recent: list[float]
    curve: list[CurvePoint]
    updates: dict[str, int] = field(default_factory=dict[str, int])
    finished: bool = False
    stopped: str | None = None
    slowed: int | None = None
    scale: LossScale | None = None

    @classmethod
    def from_json(cls, data: object) -> State:
        """Raise ValueError when the data is no state."""
        curve = take_list(data, "curve", _point)
        seconds = take(data, "seconds", float)
        if not curve:
            raise ValueError("its curve has no points")
        if not 0 <= seconds < math.inf:
            raise ValueError(f"it used {seconds} seconds")
        return cls(
            count(take(data, "step", int)),
            seconds,
            printable(take(data, "precision", str)),
            list(take_list(data, "order", count)),
            list(take_list(data, "recent", _float)),
            list(curve),
            {name: count(value) for name, value in take(data, "updates", dict).items()},
            take(data, "finished", bool),
            optional(data, "stopped", printable),
            optional(data, "slowed", count),
            optional(data, "scale", _scale),
        )


def _scale(data: object) -> LossScale:
    factor = take(data, "factor", float)
    if not 0 < factor < math.inf:
        raise ValueError(f"its losses are scaled by {factor}")
    return LossScale(factor, count(take(data, "lasted", int)), count(take(data, "skipped", int)))


def _float(data: object) -> float:
    if not isinstance(data, float):
        raise ValueError(f"{shown(data)} is not a floating-point number")
    return data


def _point(data: object) -> CurvePoint:
    loss, step = optional(data, "loss", _float), count(take(data, "step", int))
    return CurvePoint(step, take(data, "seconds", float), loss, take(data, "held_out", float))


class Checkpoint:
    """The directory of one run, in use by one process, or by the ranks of one run.

    Args:
        run: what makes the run, as texts by name; a directory of another run is refused.
        sharded: every rank has tensors of its own, and all ranks see one directory; otherwise rank 0 alone reads and writes.

    Attributes:
        problem: why a state could not be written, as a sentence; the run goes on without it.

    Raises:
        ArtifactError: when the directory cannot be made, or another process uses it.
    """

    def __init__(self, directory: str, run: Mapping[str, str], ranks: Ranks, *, sharded: bool = False) -> None:
        self.directory, self.problem = Path(directory), None
        self._run = {**run, "number of ranks": str(ranks.world_size) if sharded else "any"}
        self._ranks, self._sharded = ranks, sharded
        self._ending = f"-rank-{ranks.rank}.safetensors" if sharded else ".safetensors"
        self._cost, self._written, self._step = 0.0, -math.inf, -1
        self._handle: int | None = None
        try:
            self._on_all(self._open if ranks.rank == 0 else None)
        except BaseException:
            self.close()
            raise

    def _on_all(self, work: Callable[[], None] | None) -> None:
        """Do something on this rank. Raises ArtifactError on all ranks when it fails on one."""
        own = None
        try:
            if work is not None:
                work()
        except (ArtifactError, OSError, ValueError) as error:
            own = str(error) if isinstance(error, ArtifactError) else f"'{self.directory}' cannot be used: {reason(error)}"
        if (problem := self._ranks.settle(own)) is not None:
            raise ArtifactError(problem)

    def _open(self) -> None:
        check_path(self.directory).mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some file systems have no locks; then nobody is told.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ArtifactError(f"another process trains in '{self.directory}'; wait for it, or name another") from error
        self._delete(lambda path: _TEMPORARY.fullmatch(path.name) is not None)
        if not (self.directory / STATE).exists():
            for path in sorted(self.directory.iterdir()):
                if _TENSORS.fullmatch(path.name):
                    self._check_ours(path)

    def _check_ours(self, path: Path) -> None:
        """Refuse a file of another program under a name that a run may write. Raises ArtifactError."""
        if os.path.lexists(path) and not _is_ours(path):
            raise ArtifactError(
                f"'{self.directory}' holds '{path.name}', which no run of Lissom wrote, and this run may replace it; "
                f"choose another directory"
            )

    def close(self) -> None:
        """Let another process use the directory."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def read(self, wanted: Callable[[State], Mapping[str, torch.Tensor]]) -> tuple[State, dict[str, torch.Tensor]] | None:
        """The state and its tensors, the same on all ranks where they are not sharded; None in a new directory.

        Args:
            wanted: for a state its tensors by name, with the right shapes and dtypes.

        Raises:
            ArtifactError: when the directory holds the state of another run, or one that cannot be read.
        """
        state_bytes: list[bytes] = [b""]

        def read_state() -> None:
            path = self.directory / STATE
            if path.exists() or path.is_symlink():
                self._check(raw := read_plain(path, _MOST_BYTES))
                state_bytes[0] = raw

        self._on_all(read_state if self._ranks.rank == 0 else None)
        raw = self._ranks.broadcast_bytes(state_bytes[0])
        if not raw:
            return None
        state = self._check(raw)
        tensors: dict[str, torch.Tensor] = {}

        def read_tensors() -> None:
            tensors.update(self._read_tensors(_stem(state) + self._ending, templates))

        templates = {name: tensor.detach().cpu() for name, tensor in wanted(state).items()}
        self._on_all(read_tensors if self._sharded or self._ranks.rank == 0 else None)
        if not self._sharded:
            tensors = {name: self._ranks.broadcast(tensors.get(name, template.clone())) for name, template in templates.items()}
        self._step = state.step
        return state, tensors

    def _check(self, raw: bytes) -> State:
        path = self.directory / STATE
        advice = "choose another directory, or delete this one"
        try:
            data = parse_json(raw, path, any_number=True)
            if take(data, "format", int) != FORMAT_VERSION:
                raise ValueError(f"it has format {take(data, 'format', int)}, and this version reads {FORMAT_VERSION}")
            run = take(data, "run", dict)
            differ = [name for name, text in self._run.items() if take(run, name, str) != text]
            state = State.from_json(take(data, "state", dict))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"'{path}' is not the state of a run: {error}; {advice}") from error
        if differ:
            raise ArtifactError(f"'{self.directory}' holds the state of another run, without the same {differ[0]}; {advice}")
        return state

    def _read_tensors(self, name: str, templates: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # Imported when first needed.
        from safetensors import SafetensorError, safe_open

        path = self.directory / name
        open_plain(path).close()
        try:
            with safe_open(path, framework="pt") as file:
                if {*file.keys()} != {*templates}:
                    raise ValueError("it holds tensors of other names")
                for key, like in templates.items():
                    part = file.get_slice(key)
                    if tuple(part.get_shape()) != like.shape or part.get_dtype() != DTYPES[like.dtype]:
                        raise ValueError(f"'{shown(key)}' is {part.get_dtype()} {part.get_shape()}, not {list(like.shape)}")
                tensors = {key: file.get_tensor(key).clone() for key in templates}
            for key, tensor in tensors.items():
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    raise ValueError(f"{shown(key)} holds infinities or NaN")
        except (SafetensorError, OSError, ValueError) as error:
            raise ArtifactError(
                f"'{path}' does not fit its run: {error}; choose another directory, or delete this one"
            ) from error
        return tensors

    def due(self, measured: bool) -> bool:
        """True if a state is to be written now.

        Args:
            measured: whether the held-out loss was measured since the last one.
        """
        passed = time.perf_counter() - self._written
        return passed >= _COST * self._cost and (measured or passed >= _SECONDS)

    def write(self, state: State, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a state, completely or not at all; all ranks call it. A full disk becomes `problem`."""
        if state.step == self._step and not state.finished:
            return
        started = time.perf_counter()
        try:
            if self._sharded:
                self._on_all(lambda: self._write_tensors(_stem(state), tensors))
            elif self._ranks.rank == 0:
                self._write_tensors(_stem(state), tensors)
            if self._ranks.rank == 0:
                self._commit(state)
            self._step = state.step
        except ArtifactError as error:
            self.problem = f"the state of the run was not written, and training went on: {error}"
        self._written = time.perf_counter()
        self._cost = self._written - started

    def _write_tensors(self, stem: str, tensors: Mapping[str, torch.Tensor]) -> None:
        path = self.directory / (stem + self._ending)
        self._check_ours(path)
        with writing_whole(path) as file:
            write_tensors(file, tensors, _NOTE)

    def _commit(self, state: State) -> None:
        """Make the tensors that were written the state, and delete those of the states before."""
        data = {"format": FORMAT_VERSION, "run": self._run, "state": asdict(state)}
        write_whole(self.directory / STATE, json.dumps(data))
        self._delete(lambda path: (match := _TENSORS.fullmatch(path.name)) is not None and match[1] != _stem(state))

    def _delete(self, chosen: Callable[[Path], bool]) -> None:
        """Delete those of the chosen files that a checkpoint wrote."""
        with suppress(OSError):
            for path in [path for path in self.directory.iterdir() if chosen(path) and _is_ours(path)]:
                path.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """True for a file of tensors that a checkpoint wrote, even if it was killed meanwhile."""
    try:
        with open_plain(path) as file:
            return file.read(8 + len(_HEADER))[8:] == _HEADER
    except (ArtifactError, OSError):
        return False


def _stem(state: State) -> str:
    """The name of the tensors' file, without what makes it a rank's."""
    return "result" if state.finished else f"step-{state.step}"
