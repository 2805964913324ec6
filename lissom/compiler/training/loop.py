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


def train(
    learned: Mapping[str, nn.Parameter],
    zeros: Mapping[str, torch.Tensor],
    loss: Loss,
    count: int,
    judge: Callable[[], float],
    plan: Plan,
    report: Callable[[str, float], None],
    scales: Collection[str] = (),
) -> Trained:
    """Train the weights in place, and leave those with the smallest held-out loss, which may be those from before.

    learned: the parameters by name. zeros: for some of them where they stay zero. count: of batches. judge: the held-out loss.
    report: called with a sentence and the fraction of the run that is over. scales: the names of scales, which stay positive.

    An interrupt ends the run and keeps the best weights.
    """
    run = _Run(learned, zeros, loss, count, judge, plan, report, scales)
    try:
        run.measure()
        run.steps()
    except KeyboardInterrupt:
        run.found.stopped = "it was interrupted"
    finally:
        run.restore_best()
    return run.found


class _Run:
    """The state of one run."""

    def __init__(
        self,
        learned: Mapping[str, nn.Parameter],
        zeros: Mapping[str, torch.Tensor],
        loss: Loss,
        count: int,
        judge: Callable[[], float],
        plan: Plan,
        report: Callable[[str, float], None],
        scales: Collection[str],
    ) -> None:
        self.learned, self.zeros, self.loss, self.count = learned, zeros, loss, count
        self.judge, self.plan, self.report = judge, plan, report
        self.weights = [item for name, item in learned.items() if name not in scales]
        self.scales = [item for name, item in learned.items() if name in scales]
        # A step of Adam has the size of the learning rate, and scales are small: each changes by its share of the largest one.
        rates = [_SCALE_RATE * float(item.detach().max()) for item in self.scales]
        groups = [{"params": self.weights, "share": 1.0}]
        groups += [{"params": [item], "share": rate} for item, rate in zip(self.scales, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, weight_decay=0.0, fused=True)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.found = Trained()
        self.kept: dict[str, torch.Tensor] = {name: item.detach().clone() for name, item in learned.items()}
        self.started, self.step, self.recent = time.perf_counter(), 0, list[float]()

    def measure(self) -> None:
        """Add a point to the curve; keep the weights if the held-out loss is the smallest so far."""
        with torch.no_grad():
            held_out = self.judge()
        mean = sum(self.recent) / len(self.recent) if self.recent else None
        point = CurvePoint(self.step, time.perf_counter() - self.started, mean, held_out)
        self.found.curve.append(point)
        self.recent = []
        if self.found.best is None or held_out < self.found.best.held_out:
            self.found.best = point
            if self.step:
                for name, item in self.learned.items():
                    self.kept[name].copy_(item.detach())

    def steps(self) -> None:
        autocast = self._choose_precision()
        self.started = time.perf_counter()
        order: list[int] = []
        judged_at, done = 0, 0.0
        while done < 1.0:
            order = order or torch.randperm(self.count, generator=self.generator).tolist()
            if not self._take_step(order.pop(), done, autocast):
                return
            done = self.plan.done(time.perf_counter() - self.started, self.step)
            if done >= 1.0 or (done * _JUDGED >= len(self.found.curve) and self.step >= judged_at + _LEAST_STEPS):
                judged_at = self.step
                self.measure()
            self._tell(done)

    def _take_step(self, batch: int, done: float, autocast: bool) -> bool:
        """Train on one batch; False when a value was not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.plan.rate(done)
        value = self._gradients(batch, done, autocast)
        norms = [nn.utils.clip_grad_norm_(items, _CLIPPED) for items in (self.weights, self.scales) if items]
        if not (value.isfinite() and all(norm.isfinite() for norm in norms)):
            self.found.stopped = f"the loss or its gradient was not finite after {self.step} steps"
            return False
        self.optimizer.step()
        with torch.no_grad():
            for name, kept in self.zeros.items():
                self.learned[name].masked_fill_(kept, 0.0)
            for scale in self.scales:
                scale.clamp_min_(LEAST)
        self.recent.append(float(value))
        self.step += 1
        return True

    def _gradients(self, batch: int, done: float, autocast: bool) -> torch.Tensor:
        self.optimizer.zero_grad()
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
        self.found.precision = "bf16" if chosen else "fp32"
        return chosen

    def _tell(self, done: float) -> None:
        seconds = time.perf_counter() - self.started
        left = seconds * (1 - done) / max(done, 1e-6)
        loss = f"loss {self.recent[-1]:.4g}, " if self.recent else ""
        self.report(f"{loss}held out {self.found.curve[-1].held_out:.4g}, {left:.0f} s left", done)

    def restore_best(self) -> None:
        with torch.no_grad():
            for name, item in self.learned.items():
                item.copy_(self.kept[name])
                item.grad = None
