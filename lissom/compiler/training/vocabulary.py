"""The losses of token logits over a large vocabulary, without the logits of all tokens at once.

An LM head makes logits of a hidden state h [tokens, width] with a weight W [vocabulary, width] and a bias b; f is what follows
it, such as the soft cap c · tanh(z / c) or a scale:

    s = f(h Wᵀ + b),    L = α · CE(y, s) + share · τ² · KL(softmax(t / τ) ‖ softmax(s / τ))

Logits of 512 tokens over 262,144 entries are 537 MB in float32, and a loss needs several tensors of that size. Here both losses
and their gradients to h, W and b are computed for some tokens at a time, in the forward pass, and the backward pass scales
them. The teacher is kept as its own last hidden state, from which its head gives the same logits t. Hsu et al. 2024, Liger
Kernel, §3.2, FusedLinearCrossEntropy. Wijmans et al. 2024, Cut Your Losses in Large-Vocabulary Language Models, divide the
vocabulary too. https://arxiv.org/abs/2410.10989, https://arxiv.org/abs/2411.09009
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from lissom.compiler.training.lm_head import LmHead
from lissom.compiler.training.ranks import total
from lissom.ops.divergence import token_divergence

IGNORED = -100
"""The label of a token without one, as in `torch.nn.functional.cross_entropy`."""
ELEMENTS = 1 << 25
"""The logits computed at a time: 134 MB in float32, and three tensors of that size, or five with labels or without kernels."""

_LARGEST = 1024.0
"""The largest weight of a token in float16, whose smallest number is 6e-8: the gradient of a mean over 512 tokens by a logit of
probability 1e-5 would be 2e-8. The gradient by a logit is at most the weight, its sum over a row twice that."""


@dataclass(frozen=True)
class Supervision:
    """Supervision of the tokens of a batch. All tensors are by token, [tokens].

    Attributes:
        teacher: an LM head with its hidden state [tokens, width].
        shares: the weight of the token's divergence from the teacher.
        labels: -100 for tokens without one.
        alphas: the weight of the token's cross-entropy.
    """

    temperature: float
    teacher: tuple[LmHead, torch.Tensor] | None
    shares: torch.Tensor
    labels: torch.Tensor
    alphas: torch.Tensor

    def of(self, chosen: torch.Tensor) -> Supervision:
        """Supervision of the selected tokens.

        Args:
            chosen: booleans, [tokens].
        """
        teacher = None if self.teacher is None else (self.teacher[0], self.teacher[1][chosen])
        return Supervision(self.temperature, teacher, self.shares[chosen], self.labels[chosen], self.alphas[chosen])

    def times(self, factor: float) -> Supervision:
        """With weights that are `factor` times as large."""
        return replace(self, shares=self.shares * factor, alphas=self.alphas * factor)

    def factor_in(self, dtype: torch.dtype) -> float:
        """Float16 loss scale, with which the largest weight of a token is `_LARGEST`; 1 in other dtypes."""
        if dtype != torch.float16 or not self.shares.numel():
            return 1.0
        largest = float(torch.maximum(self.shares, self.alphas).max())
        return _LARGEST / largest if largest else 1.0


def supervision(
    hidden: torch.Tensor,
    teacher: tuple[LmHead, torch.Tensor] | None = None,
    *,
    real: torch.Tensor | None = None,
    temperature: float = 1.0,
    share: float = 1.0,
    labels: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> Supervision:
    """The mean divergence over real tokens with the weight `share`, and the mean cross-entropy over labels with `alpha`.

    Means are over the tokens of all ranks.

    Args:
        hidden: of the student, [batch, tokens, width]; that of the teacher has its own width.
        real: [batch, tokens]; None where all tokens are real.
        labels: [batch, tokens]; None where none has a label.
    """
    alphas = shares = torch.zeros(hidden.shape[:2], device=hidden.device)
    if teacher is not None:
        shares = torch.ones_like(shares) if real is None else real.float()
        shares = shares * (share / total(shares.sum()).clamp_min(1))
    if labels is not None:
        known = (labels != IGNORED).float()
        alphas = known * (alpha / total(known.sum()).clamp_min(1))
    given = torch.full_like(shares, IGNORED, dtype=torch.int64) if labels is None else labels
    flat = None if teacher is None else (teacher[0], teacher[1].flatten(0, 1))
    return Supervision(temperature, flat, shares.flatten(), given.flatten(), alphas.flatten())


def vocabulary_loss(head: LmHead, hidden: torch.Tensor, learned: Supervision, *, elements: int = ELEMENTS) -> torch.Tensor:
    """The loss L of a student's hidden state [batch, tokens, width], [] in float32.

    Products are computed in the dtype of autocast, losses in float32.

    Args:
        elements: the most logits at a time.
    """
    rows, device = hidden.flatten(0, 1), hidden.device.type
    counted = (learned.shares != 0) | (learned.alphas != 0)
    if not bool(counted.all()):
        rows, learned = rows[counted], learned.of(counted)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    student = _Product(head, rows if dtype is None else rows.to(dtype), *head.weights(dtype))
    teacher = None
    if learned.teacher is not None:
        teacher = _Product(*learned.teacher, *learned.teacher[0].fixed_weights(dtype))
    count, differentiated = max(1, elements // head.vocabulary), torch.is_grad_enabled()
    with torch.autocast(device, enabled=False):
        factor = learned.factor_in(student.weight.dtype)
        learned = learned.times(factor)
        loss: Any = _Loss.apply(student.rows, student.weight, student.bias, head, teacher, learned, count, differentiated)
    return loss / factor


@dataclass(frozen=True)
class _Product:
    """The linear layer of an LM head with its operands."""

    head: LmHead
    rows: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self, chosen: slice) -> torch.Tensor:
        """[rows, vocabulary]."""
        rows = self.rows[chosen].to(self.weight.dtype)
        return self.head.finish(functional.linear(rows, self.weight, self.bias))


class _Loss(torch.autograd.Function):
    """The loss and its gradients, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        head: LmHead,
        teacher: _Product | None,
        learned: Supervision,
        count: int,
        differentiated: bool,
    ) -> torch.Tensor:
        wanted = [differentiated and needed for needed in ctx.needs_input_grad[:3]]
        of_rows = torch.empty_like(rows) if wanted[0] else None
        # Sums over rows are in float32.
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        of_bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if wanted[2] else None
        summed = torch.zeros((), device=rows.device)
        for start in range(0, len(rows), count):
            chosen = slice(start, start + count)
            product = functional.linear(rows[chosen], weight, bias)
            loss, gradient = _loss_and_gradient(product, head, teacher, learned, chosen, differentiated=any(wanted))
            summed += loss
            if of_rows is not None:
                torch.mm(gradient, weight, out=of_rows[chosen])
            if of_weight is not None:
                of_weight.addmm_(gradient.T.float(), rows[chosen].float())
            if of_bias is not None:
                of_bias += gradient.sum(0, dtype=torch.float32)
        ctx.gradients = (of_rows, of_weight, of_bias)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (given,), computed = gradients, ctx.gradients
        del ctx.gradients
        scaled = [gradient if gradient is None or bool(given == 1) else gradient * given for gradient in computed]
        return (*scaled, *[None] * 5)


def _loss_and_gradient(
    product: torch.Tensor,
    head: LmHead,
    teacher: _Product | None,
    learned: Supervision,
    chosen: slice,
    *,
    differentiated: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some rows, and its gradient to the result of their linear layer, [rows, vocabulary], in its dtype."""
    if not head.tail or not differentiated:
        loss, gradient = _losses(head.finish(product), teacher, learned, chosen)
        return loss, gradient.to(product.dtype)
    with torch.enable_grad():
        leaf = product.detach().requires_grad_()
        logits = head.finish(leaf)
    loss, gradient = _losses(logits.detach(), teacher, learned, chosen)
    return loss, torch.autograd.grad(logits, leaf, gradient.to(logits.dtype))[0]


def _losses(
    logits: torch.Tensor, teacher: _Product | None, learned: Supervision, chosen: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of some rows' logits [rows, vocabulary], and its gradient to them: α (q₁ - y) + share · τ (q - p)."""
    alphas, temperature = learned.alphas[chosen, None], learned.temperature
    summed, gradient = torch.zeros((), device=logits.device), None
    if bool((alphas != 0).any()):
        log_q = logits.float().log_softmax(-1)
        labels = learned.labels[chosen, None].clamp_min(0)
        summed = summed - (log_q.gather(1, labels) * alphas).sum()
        gradient = log_q.exp_().mul_(alphas).scatter_add_(1, labels, -alphas)
    if teacher is not None:
        loss, of_divergence = token_divergence(logits, teacher.logits(chosen), learned.shares[chosen], temperature)
        summed = summed + loss
        gradient = of_divergence if gradient is None else gradient.add_(of_divergence)
    return summed, torch.zeros_like(logits) if gradient is None else gradient
