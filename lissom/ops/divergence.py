"""`lissom::token_divergence`: the divergence of a student's token logits from a teacher's, with its gradient.

With p = softmax(t / τ) of the teacher and q = softmax(s / τ) of the student, over tokens with weights w,

    τ² Σ w Σ p · log(p / q),    and its gradient to s,    τ · w · (q - p)

The sum is computed as that of p · (q / p + log(p / q) - 1), which is the same and whose terms do not cancel. Both come from one
call, as `lissom.compiler.training.vocabulary` needs them, and the gradient is all that is written: logits over 262,144 entries
take longer to read and write than to compute. Hinton et al. 2015, Distilling the Knowledge in a Neural Network,
§2. https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import torch

from lissom.ops.library import define


def token_divergence_reference(
    student: torch.Tensor, teacher: torch.Tensor, shares: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference implementation."""
    weights = shares.float()[:, None]
    log_q, log_p = (logits.float().div(temperature).log_softmax(-1) for logits in (student, teacher))
    p, difference = log_p.exp(), log_p.sub_(log_q)
    terms = difference.neg().expm1_().add_(difference).mul_(p)
    q = log_q.exp_()
    # Where p is 0, log p may be -inf.
    loss = temperature**2 * (torch.where(p == 0, q, terms).sum(-1, keepdim=True) * weights).sum()
    return loss, q.sub_(p).mul_(temperature * weights).to(student.dtype)


def _fake(student: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return student.new_empty((), dtype=torch.float32), torch.empty_like(student)


token_divergence = define(
    "token_divergence(Tensor student, Tensor teacher, Tensor shares, float temperature) -> (Tensor, Tensor)",
    token_divergence_reference,
    _fake,
)
"""The operator. student, teacher: logits, [tokens, vocabulary]; shares: [tokens]. Returns the loss, [] in float32, and the
gradient in the student's shape and dtype. Not differentiable."""
