"""The gradients of a step: of products in half precision where asked for, scaled in float16, and clipped.

Weights and their gradients are in float32. Gradients of activations in float16 below 6e-8 would become zero, so losses are
multiplied by a scale first: half of it after a step whose gradients overflowed, which changes nothing else, and twice of it
after many that did not. The norm that a step is clipped by tells, and is that of all ranks; `torch.amp.GradScaler` looks at
each rank's gradients by themselves. Micikevicius et al. 2018, Mixed Precision Training, §3. https://arxiv.org/abs/1710.03740
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lissom.compiler.training.ranks import Ranks
from lissom.compiler.training.shards import Shards

Precision = Literal["auto", "fp32", "bf16", "fp16"]
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtype of products by the name of a precision; None for that of the weights."""
Loss = Callable[[int, float], torch.Tensor]
"""The loss of one batch. Takes the index of the batch, and the fraction of the run that is over."""
_CLIPPED = 1.0
"""The largest norm of the gradient of a step."""
_ALIKE = 0.98
"""The cosine between the gradients of one batch in bfloat16 and in float32 from which bfloat16 may be used."""
_GROWS = 2000
"""The steps without overflow after which the scale of losses doubles, as in `torch.amp.GradScaler`."""


@dataclass
class LossScale:
    """The scale of losses in float16.

    Attributes:
        factor: a power of two.
        lasted: the steps without overflow since it changed.
        skipped: all steps that overflowed.
    """

    factor: float = 2.0**16
    lasted: int = 0
    skipped: int = 0

    def halve(self) -> bool:
        """After an overflow; False when the scale is 1, as then not the scale is to blame."""
        if self.factor <= 1:
            return False
        self.factor, self.lasted, self.skipped = self.factor / 2, 0, self.skipped + 1
        return True

    def keep(self) -> None:
        """After a step without overflow."""
        self.lasted += 1
        if self.lasted == _GROWS:
            self.factor, self.lasted = self.factor * 2, 0


@dataclass(frozen=True)
class Gradients:
    """Computes the gradients of parameters.

    Attributes:
        learned: the parameters by name, or this rank's shards of them.
        zeros: for some of them where they stay zero.
        loss: of this rank's rows; the losses of the ranks add up.
        shards: of sharded weights.
    """

    learned: Mapping[str, nn.Parameter]
    zeros: Mapping[str, torch.Tensor]
    loss: Loss
    ranks: Ranks
    shards: Shards | None

    @property
    def _device(self) -> str:
        return next(iter(self.learned.values())).device.type

    def compute(self, batch: int, done: float, precision: str, factor: float = 1.0) -> torch.Tensor:
        """The loss of a batch; the parameters get `factor` times its gradients."""
        dtype = AUTOCAST[precision]
        for parameter in self.learned.values():
            parameter.grad = None
        with torch.enable_grad(), self.shards.regathering() if self.shards is not None else nullcontext():
            with torch.autocast(self._device, dtype) if dtype is not None else nullcontext():
                value = self.loss(batch, done)
            (value * factor).backward()
        for name, kept in self.zeros.items():
            gradient = self.learned[name].grad
            if gradient is not None:
                gradient.masked_fill_(kept, 0.0)
        return value.detach()

    def clip(self, items: Sequence[nn.Parameter], factor: float) -> float:
        """Divide the gradients by `factor` and clip their norm, whole or sharded; returns the norm before."""
        gradients = [parameter.grad for parameter in items if parameter.grad is not None]
        if factor != 1:
            for gradient in gradients:
                gradient.div_(factor)
        norm = nn.utils.get_total_norm(gradients)
        if self.shards is not None:
            norm = self.ranks.sum(norm.square()).sqrt()
        if (size := float(norm)) > _CLIPPED:
            nn.utils.clip_grads_with_norm_(items, _CLIPPED, norm)
        return size

    def choose(self, precision: Precision) -> str:
        """The precision asked for; for `auto` bfloat16 where a CPU is faster in it and the gradients agree, else float32."""
        if precision != "auto":
            return precision
        bf16 = self._device == "cpu" and self._is_better_in_bf16()
        return "bf16" if bool(self.ranks.broadcast(torch.tensor(bf16, dtype=torch.uint8))) else "fp32"

    def _is_better_in_bf16(self) -> bool:
        gradients: list[torch.Tensor] = []
        seconds: list[float] = []
        for precision in ("fp32", "bf16"):
            times: list[float] = []
            for _ in range(2):
                began = time.perf_counter()
                self.compute(0, 1.0, precision)
                times.append(time.perf_counter() - began)
            seconds.append(min(times))
            parts = [parameter.grad for parameter in self.learned.values() if parameter.grad is not None]
            gradients.append(torch.cat([gradient.flatten() for gradient in parts]))
        alike = torch.nn.functional.cosine_similarity(*gradients, dim=0)
        return seconds[1] < 0.9 * seconds[0] and bool(alike > _ALIKE)
