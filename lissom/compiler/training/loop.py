"""The training loop: steps until a deadline, the best weights by the held-out loss, and the curve of both losses.

AdamW (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, without decay) on float32 weights. The learning rate
rises over the first twentieth and falls linearly to zero at the deadline. A run that doubled the held-out loss in its first
quarter goes back to the start, and on with a thirtieth of the rate. https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lissom.compiler.ir.editor import CurvePoint
from lissom.compiler.memory import give_back_memory
from lissom.compiler.training.checkpoint import (
    BEST,
    FIRST,
    GLOBAL_GENERATOR,
    ORDER_GENERATOR,
    SECOND,
    WEIGHT,
    Checkpoint,
    State,
)
from lissom.compiler.training.gradients import AUTOCAST, Gradients, Loss, LossScale, Precision
from lissom.compiler.training.interrupt import Interrupt
from lissom.compiler.training.ranks import Ranks
from lissom.compiler.training.shards import Shards
from lissom.errors import ArtifactError

_WARM_UP = 0.05
_JUDGED = 10
"""Measurements of the held-out loss in a run, at most one every `_LEAST_STEPS` steps."""
_JUDGING = 0.05
"""The fraction of a run with a deadline in seconds that may go into measuring the held-out loss, but for the measurements after
the first quarter and at the end."""
_LEAST_STEPS = 2
_TRIED = 0.25
"""The fraction of a run after which its learning rate is judged."""
_WORSE = 1.0
"""The relative rise of the held-out loss that a rate is to blame for. A good one may raise it while it is high: on MiniLM with
0.75 of its neurons 3e-4 raised it by half, and left it a quarter smaller. Rates 3 to 5 times too high more than doubled it."""
SLOWED = 1 / 30
"""The factor of the learning rate of a run that went back: the best rates of what was tried lie between 3e-4 and 1e-5."""
_TRIMMED = 1.0
"""The seconds after which memory that holds nothing is given back. Rows of many lengths, and what PyTorch keeps of each length,
leave gaps: on MiniLM 200 MiB in a minute. Giving them back takes 4 to 15 ms."""


@dataclass(frozen=True)
class Plan:
    """Duration, learning rate and precision of a training run.

    Attributes:
        seconds: the deadline in seconds; None with `steps`.
        steps: the deadline in steps; None with `seconds`.
        precision: of products and activations; `auto` measures.
    """

    seconds: float | None
    steps: int | None
    learning_rate: float
    precision: Precision
    seed: int

    def done(self, seconds: float, steps: int) -> float:
        """The fraction of the run that is over."""
        passed = steps / self.steps if self.steps is not None else seconds / (self.seconds or 1.0)
        return min(passed, 1.0)

    def rate(self, done: float) -> float:
        return self.learning_rate * min(1.0, (done + 1e-3) / _WARM_UP) * (1.0 - done)


@dataclass
class Trained:
    """The result of a run.

    Attributes:
        stopped: why it ended early, or None.
        precision: that was used.
        resumed: the step from which it went on, or None.
        slowed: the step at which it went back to the start, or None.
        scale: of losses in float16.
    """

    curve: list[CurvePoint] = field(default_factory=list[CurvePoint])
    best: CurvePoint | None = None
    stopped: str | None = None
    precision: str = "fp32"
    resumed: int | None = None
    slowed: int | None = None
    scale: LossScale | None = None

    @property
    def gained(self) -> bool:
        return self.best is not None and self.best.step > 0

    @property
    def shortfall(self) -> str:
        """The reason no step gained anything, as the end of a sentence; empty if the losses do not tell."""
        if not any(point.held_out for point in self.curve):
            return ": the outputs are equal already"
        losses = [point.loss for point in self.curve if point.loss is not None]
        if len(losses) < 2 or losses[-1] >= losses[0]:
            return ""
        fell = f"the loss of the training batches fell from {losses[0]:.4g} to {losses[-1]:.4g}"
        return f", while {fell}: it fits these batches only, pass more data="


@dataclass(frozen=True)
class Scale:
    """Learning rates and lower bound of a quantizer's scale.

    Attributes:
        rates: the learning rate of each element against that of weights, in the scale's shape.
        least: the smallest size, which its dtype after the run still holds. Signs stay.
    """

    rates: torch.Tensor
    least: float


@dataclass
class Run:
    """A run that trains weights in place.

    Attributes:
        learned: the parameters by name, or this rank's shards of them.
        zeros: for some of them where they stay zero.
        loss: of this rank's rows; the losses of the ranks add up.
        count: of batches.
        judge: the held-out loss of all ranks.
        report: called with a sentence and the fraction of the run that is over.
        scales: those of `learned` that are scales of quantizers, by name.
        ranks: that train together.
        shards: of sharded weights.
        checkpoint: where the state is written, and is read.
    """

    learned: Mapping[str, nn.Parameter]
    zeros: Mapping[str, torch.Tensor]
    loss: Loss
    count: int
    judge: Callable[[], float]
    plan: Plan
    report: Callable[[str, float], None]
    scales: Mapping[str, Scale] = field(default_factory=dict[str, Scale])
    ranks: Ranks = field(default_factory=Ranks)
    shards: Shards | None = None
    checkpoint: Checkpoint | None = None

    def __post_init__(self) -> None:
        self._weights = [parameter for name, parameter in self.learned.items() if name not in self.scales]
        self._scales = [self.learned[name] for name in self.scales]
        self._signs = [scale.detach().sign() for scale in self._scales]
        self._items = [self.learned[name] for name in self._names()]
        self._optimizer = torch.optim.AdamW(self._items, lr=self.plan.learning_rate, weight_decay=0.0, fused=True)
        self._gradients = Gradients(self.learned, self.zeros, self.loss, self.ranks, self.shards)
        self._generator = torch.Generator().manual_seed(self.plan.seed)
        self._trained = Trained()
        self._kept = {name: parameter.detach().clone() for name, parameter in self.learned.items()}
        self._step, self._seconds, self._recent, self._order = 0, 0.0, list[float](), list[int]()
        self._started, self._interrupt, self._measured = time.perf_counter(), Interrupt(), False
        self._trimmed = self._started
        self._ending, self._judging, self._last_judging, self._judges = False, 0.0, 0.0, True

    def train(self) -> Trained:
        """Leave the weights with the smallest held-out loss, which may be those from before.

        An interrupt ends the run after the current step, on all ranks, and keeps the best weights. With a checkpoint, a run
        that was ended before goes on where it was, and a finished one gives its result.

        Raises:
            ArtifactError: for a checkpoint of another run.
            RankError: when a rank ended.
        """
        try:
            with self._interrupt:
                if not self._resume():
                    self._save(finished=self._steps())
        except KeyboardInterrupt:
            if self.ranks.world_size > 1:
                raise
            self._trained.stopped = "it was interrupted"
        finally:
            self._restore_best()
        return self._trained

    def _measure(self) -> None:
        """Add a point to the curve; keep the weights if the held-out loss is the smallest so far."""
        began = time.perf_counter()
        with torch.no_grad():
            held_out = self.judge()
        self._last_judging = time.perf_counter() - began
        self._judging += self._last_judging
        mean = sum(self._recent) / len(self._recent) if self._recent else None
        point = CurvePoint(self._step, time.perf_counter() - self._started, mean, held_out)
        self._trained.curve.append(point)
        self._recent, self._measured = [], True
        if self._trained.best is None or held_out < self._trained.best.held_out:
            self._trained.best = point
            if self._step:
                for name, parameter in self.learned.items():
                    self._kept[name].copy_(parameter.detach())

    def _steps(self) -> bool:
        """Train; False when the run was interrupted."""
        if not self._trained.curve:
            self._measure()
            self._trained.precision = self._gradients.choose(self.plan.precision)
            self._trained.scale = LossScale() if self._trained.precision == "fp16" else None
            self._started, self._judging = time.perf_counter(), 0.0
        done = self.plan.done(self._seconds, self._step)
        while done < 1.0:
            self._order = self._order or torch.randperm(self.count, generator=self._generator).tolist()
            writes = self._take_step(self._order.pop(), done)
            if writes is None:
                return True
            before, done = done, self.plan.done(self._seconds, self._step)
            due = done * _JUDGED >= len(self._trained.curve) and self._step >= self._trained.curve[-1].step + _LEAST_STEPS
            tried = before < _TRIED <= done
            if done >= 1.0 or tried or (due and self._judges):
                self._measure()
            if tried and done < 1.0:
                self._slow_down()
            self._tell(done)
            if self._ending and done < 1.0:
                self._trained.stopped = "it was interrupted"
                return False
            if writes and done < 1.0:
                self._save()
        return True

    def _slow_down(self) -> None:
        """Go back to the start, and on at a lower rate, if the held-out loss is twice as large and never was smaller."""
        first, *_, last = (point.held_out for point in self._trained.curve)
        if last > first + _WORSE * abs(first) and self._trained.best is self._trained.curve[0]:
            self._trained.slowed = self._step
            self._restore_best()
            self._optimizer.state.clear()

    def _take_step(self, batch: int, done: float) -> bool | None:
        """Train on one batch; None when a value was not finite, else whether to write a state after it.

        Rank 0 decides on the time, on measuring and on writing; an interrupt of any rank is one of all.
        """
        rate = self.plan.rate(done) * (1.0 if self._trained.slowed is None else SLOWED)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        scale = self._trained.scale
        factor = 1.0 if scale is None else scale.factor
        value = self._gradients.compute(batch, done, self._trained.precision, factor)
        first = self.ranks.rank == 0
        writes = first and self.checkpoint is not None and self.checkpoint.due(self._measured)
        seconds = time.perf_counter() - self._started if first else 0.0
        judges = first and (self.plan.seconds is None or self._judging + self._last_judging <= _JUDGING * seconds)
        loss, self._seconds, writes, judged, interrupted, *present = self.ranks.sums(
            [float(value), seconds, writes, judges, self._interrupt.seen, *(weight.grad is not None for weight in self._items)]
        )
        self._judges = judged > 0
        if self.shards is None:
            self.ranks.add_gradients(self._items, [count > 0 for count in present])
        norms = [self._gradients.clip(items, factor) for items in (self._weights, self._scales) if items]
        if all(map(math.isfinite, (loss, *norms))):
            self._update()
            if scale is not None:
                scale.keep()
        elif scale is None or not math.isfinite(loss) or not scale.halve():
            self._trained.stopped = f"the loss or its gradient was not finite after {self._step} steps"
            if scale is not None:
                self._trained.stopped += ", in float16 where numbers end at 65,504; precision=bf16 has the range of float32"
            return None
        self._recent.append(loss)
        self._step += 1
        self._ending = interrupted > 0
        if time.perf_counter() - self._trimmed > _TRIMMED:
            give_back_memory()
            self._trimmed = time.perf_counter()
        return writes > 0

    def _update(self) -> None:
        """Take the optimizer's step, and keep what is fixed: zeros, and signs and least sizes of scales."""
        before = [scale.detach().clone() for scale in self._scales]
        self._optimizer.step()
        with torch.no_grad():
            for name, kept in self.zeros.items():
                self.learned[name].masked_fill_(kept, 0.0)
            for how, scale, old, sign in zip(self.scales.values(), self._scales, before, self._signs, strict=True):
                scale.sub_(old).mul_(how.rates).add_(old).mul_(sign).clamp_min_(how.least).mul_(sign)

    def _tell(self, done: float) -> None:
        left = self._seconds * (1 - done) / max(done, 1e-6)
        loss = f"loss {self._recent[-1]:.4g}, " if self._recent else ""
        self.report(f"{loss}held out {self._trained.curve[-1].held_out:.4g}, {left:.0f} s left", done)

    def _restore_best(self) -> None:
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(self._kept[name])
                parameter.grad = None

    def _resume(self) -> bool:
        """Take over the state of the checkpoint, if there is one; True when its run is finished."""
        if self.checkpoint is None or (read := self.checkpoint.read(self._tensors_of)) is None:
            return False
        state, tensors = read
        for point in state.curve:
            if self._trained.best is None or point.held_out < self._trained.best.held_out:
                self._trained.best = point
        self._trained.curve, self._trained.precision, self._trained.stopped = state.curve, state.precision, state.stopped
        self._trained.resumed, self._trained.slowed, self._step = state.step, state.slowed, state.step
        self._trained.scale = state.scale
        with torch.no_grad():
            for name, parameter in self.learned.items():
                self._kept[name].copy_(tensors[BEST + name])
                parameter.copy_(tensors[(BEST if state.finished else WEIGHT) + name])
        if not state.finished:
            self._recent, self._order, self._seconds = state.recent, state.order, state.seconds
            self._started = time.perf_counter() - state.seconds
            self._set_moments(state, tensors)
            try:
                self._generator.set_state(tensors[ORDER_GENERATOR])
                torch.set_rng_state(tensors[GLOBAL_GENERATOR])
            except RuntimeError as error:
                raise _unfit(f"its random generators: {error}") from error
        return state.finished

    def _set_moments(self, state: State, tensors: Mapping[str, torch.Tensor]) -> None:
        optimizer_state = self._optimizer.state_dict()
        for index, name in enumerate(self._names()):
            if name in state.updates:
                steps = torch.tensor(float(state.updates[name]))
                optimizer_state["state"][index] = {
                    "step": steps,
                    "exp_avg": tensors[FIRST + name],
                    "exp_avg_sq": tensors[SECOND + name],
                }
        self._optimizer.load_state_dict(optimizer_state)

    def _names(self) -> list[str]:
        """The names of the parameters in the order of the optimizer."""
        return [*(name for name in self.learned if name not in self.scales), *self.scales]

    def _tensors_of(self, state: State) -> dict[str, torch.Tensor]:
        """The tensors of a state by name; those of this run, where the state is its own.

        Raises:
            ArtifactError: when the state does not fit this run.
        """
        if not {*state.updates} <= {*self.learned}:
            raise _unfit("it has other weights")
        if len({*state.order}) < len(state.order) or any(batch >= self.count for batch in state.order):
            raise _unfit(f"its order is not one of {self.count} batches")
        if state.precision not in AUTOCAST or (state.scale is not None) != (state.precision == "fp16"):
            raise _unfit(f"its precision is '{state.precision}', {'with' if state.scale else 'without'} a scale of losses")
        tensors = {BEST + name: tensor for name, tensor in self._kept.items()}
        if state.finished:
            return tensors
        tensors |= {WEIGHT + name: parameter.detach() for name, parameter in self.learned.items()}
        for name in state.updates:
            held = self._optimizer.state.get(self.learned[name], {})
            tensors[FIRST + name] = held.get("exp_avg", self._kept[name])
            tensors[SECOND + name] = held.get("exp_avg_sq", self._kept[name])
        return tensors | {ORDER_GENERATOR: self._generator.get_state(), GLOBAL_GENERATOR: torch.get_rng_state()}

    def _save(self, *, finished: bool = False) -> None:
        if self.checkpoint is None:
            return
        steps = {
            name: self._optimizer.state[parameter]["step"]
            for name, parameter in self.learned.items()
            if parameter in self._optimizer.state
        }
        updates = {name: int(count) for name, count in steps.items()}
        state = State(
            self._step,
            self._seconds,
            self._trained.precision,
            self._order,
            self._recent,
            self._trained.curve,
            updates,
            finished,
            self._trained.stopped if finished else None,
            self._trained.slowed,
            self._trained.scale,
        )
        self.checkpoint.write(state, self._tensors_of(state))
        self._measured = False


def _unfit(reason: str) -> ArtifactError:
    return ArtifactError(f"the state in the checkpoint does not fit its run: {reason}; choose another directory, or delete it")
