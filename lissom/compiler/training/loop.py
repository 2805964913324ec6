"""The training loop: steps until a deadline, the best weights by the held-out loss, and the curve of both losses.

AdamW (Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, without decay) on float32 weights. The learning rate
rises over the first twentieth and falls linearly to zero at the deadline. https://arxiv.org/abs/1711.05101
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from lissom.compiler.ir.editor import CurvePoint
from lissom.ops.formats import LEAST

Precision = Literal["auto", "fp32", "bf16"]
_WARM_UP = 0.05
_JUDGED = 10
"""How often the held-out loss is measured in a run, at most every `_LEAST_STEPS` steps."""
_LEAST_STEPS = 2
_CLIPPED = 1.0
"""The largest norm of the gradient of a step."""
_SCALE_RATE = 1.0
"""The learning rate of a scale, in relation to its largest element."""
_ALIKE = 0.98
"""The cosine between the gradients of one batch in bfloat16 and in float32 from which bfloat16 may be used."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

    seconds, steps: the deadline, one of the two. precision: of products and activations; `auto` measures.
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
    """The result of a run. stopped: why it ended early, or None. precision: that was used."""

    curve: list[CurvePoint] = field(default_factory=list[CurvePoint])
    best: CurvePoint | None = None
    stopped: str | None = None
    precision: str = "fp32"

    @property
    def gained(self) -> bool:
        return self.best is not None and self.best.step > 0


Loss = Callable[[int, float], torch.Tensor]
"""The loss of one batch. Takes the index of the batch, and the fraction of the run that is over."""


@dataclass
class Run:
    """A run that trains weights in place.

    learned: the parameters by name. zeros: for some of them where they stay zero. count: of batches. judge: the held-out loss.
    report: called with a sentence and the fraction of the run that is over. scales: the names of scales, which stay positive.
    """

    learned: Mapping[str, nn.Parameter]
    zeros: Mapping[str, torch.Tensor]
    loss: Loss
    count: int
    judge: Callable[[], float]
    plan: Plan
    report: Callable[[str, float], None]
    scales: Collection[str] = ()

    def __post_init__(self) -> None:
        self._weights = [item for name, item in self.learned.items() if name not in self.scales]
        self._scales = [item for name, item in self.learned.items() if name in self.scales]
        # A step of Adam has the size of the learning rate, and scales are small: each changes by its share of the largest one.
        groups = [{"params": self._weights, "share": 1.0}]
        groups += [{"params": [item], "share": _SCALE_RATE * float(item.detach().max())} for item in self._scales]
        self._optimizer = torch.optim.AdamW(groups, lr=self.plan.learning_rate, weight_decay=0.0, fused=True)
        self._generator = torch.Generator().manual_seed(self.plan.seed)
        self._found = Trained()
        self._kept = {name: item.detach().clone() for name, item in self.learned.items()}
        self._started, self._step, self._recent = time.perf_counter(), 0, list[float]()

    def train(self) -> Trained:
        """Leave the weights with the smallest held-out loss, which may be those from before.

        An interrupt ends the run and keeps the best weights.
        """
        try:
            self._measure()
            self._steps()
        except KeyboardInterrupt:
            self._found.stopped = "it was interrupted"
        finally:
            self._restore_best()
        return self._found

    def _measure(self) -> None:
        """Add a point to the curve; keep the weights if the held-out loss is the smallest so far."""
        with torch.no_grad():
            held_out = self.judge()
        mean = sum(self._recent) / len(self._recent) if self._recent else None
        point = CurvePoint(self._step, time.perf_counter() - self._started, mean, held_out)
        self._found.curve.append(point)
        self._recent = []
        if self._found.best is None or held_out < self._found.best.held_out:
            self._found.best = point
            if self._step:
                for name, item in self.learned.items():
                    self._kept[name].copy_(item.detach())

    def _steps(self) -> None:
        autocast = self._choose_precision()
        self._started = time.perf_counter()
        order: list[int] = []
        done = 0.0
        while done < 1.0:
            order = order or torch.randperm(self.count, generator=self._generator).tolist()
            if not self._take_step(order.pop(), done, autocast):
                return
            done = self.plan.done(time.perf_counter() - self._started, self._step)
            if done >= 1.0 or (
                done * _JUDGED >= len(self._found.curve) and self._step >= self._found.curve[-1].step + _LEAST_STEPS
            ):
                self._measure()
            self._tell(done)

    def _take_step(self, batch: int, done: float, autocast: bool) -> bool:
        """Train on one batch; False when a value was not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = group["share"] * self.plan.rate(done)
        value = self._gradients(batch, done, autocast)
        norms = [nn.utils.clip_grad_norm_(items, _CLIPPED) for items in (self._weights, self._scales) if items]
        if not (value.isfinite() and all(norm.isfinite() for norm in norms)):
            self._found.stopped = f"the loss or its gradient was not finite after {self._step} steps"
            return False
        self._optimizer.step()
        with torch.no_grad():
            for name, kept in self.zeros.items():
                self.learned[name].masked_fill_(kept, 0.0)
            for scale in self._scales:
                scale.clamp_min_(LEAST)
        self._recent.append(float(value))
        self._step += 1
        return True

    def _gradients(self, batch: int, done: float, autocast: bool) -> torch.Tensor:
        self._optimizer.zero_grad()
        with torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                value = self.loss(batch, done)
            value.backward()
        for name, kept in self.zeros.items():
            gradient = self.learned[name].grad
            if gradient is not None:
                gradient.masked_fill_(kept, 0.0)
        return value.detach()

    def _choose_precision(self) -> bool:
        """Whether to compute in bfloat16: as asked for, or where it is faster here and the gradients agree."""
        chosen = self.plan.precision == "bf16"
        if self.plan.precision == "auto":
            gradients: list[torch.Tensor] = []
            seconds: list[float] = []
            for autocast in (False, True):
                times: list[float] = []
                for _ in range(2):
                    began = time.perf_counter()
                    self._gradients(0, 1.0, autocast)
                    times.append(time.perf_counter() - began)
                seconds.append(min(times))
                found = [item.grad for item in self.learned.values() if item.grad is not None]
                gradients.append(torch.cat([item.flatten() for item in found]))
            alike = torch.nn.functional.cosine_similarity(*gradients, dim=0)
            chosen = seconds[1] < 0.9 * seconds[0] and bool(alike > _ALIKE)
        self._found.precision = "bf16" if chosen else "fp32"
        return chosen

    def _tell(self, done: float) -> None:
        seconds = time.perf_counter() - self._started
        left = seconds * (1 - done) / max(done, 1e-6)
        loss = f"loss {self._recent[-1]:.4g}, " if self._recent else ""
        self.report(f"{loss}held out {self._found.curve[-1].held_out:.4g}, {left:.0f} s left", done)

    def _restore_best(self) -> None:
        with torch.no_grad():
            for name, item in self.learned.items():
                item.copy_(self._kept[name])
                item.grad = None
