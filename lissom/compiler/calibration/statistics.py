"""Calibration: run samples through a program and collect statistics of chosen activations and their gradients.

Samples run one after another and only sums are kept, so memory does not grow with their number. Only real tokens count, those
that attention does not mask (see `real_tokens`).

There are no labels, so gradients are those of the program's own likelihood, whose second moment is the Fisher information.
An output over a vocabulary is a distribution, and a label is drawn from it. Any other output f is the mean of a normal
distribution, and the gradient is that of rᵀf / rms(f) with r drawn from N(0, I), as E[(Jᵀr)(Jᵀr)ᵀ] = JᵀJ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lissom.compiler.analysis.structure.linear import width
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.match import computed_from
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.compiler.memory import give_back_memory
from lissom.errors import RequirementError

Visit = Callable[[fx.Node, torch.Tensor], None]
VisitGradient = Callable[[fx.Node, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
_Tracked = tuple[fx.Node, torch.Tensor, torch.Tensor | None]
Progress = Callable[[int, int], None]
"""Called with the number of finished samples and their total number."""
NO_TOKENS = "the calibration data gives it no tokens"
"""The reason a layer is not calibrated, such as an expert that no token chose."""


@dataclass
class Moments:
    """Sums over the real tokens of one node's values, x: [features].

    Attributes:
        count: tokens.
        total: Σ x, [features].
        gram: Σ x·xᵀ, [features, features]. Token weights apply to all three.
    """

    count: float
    total: torch.Tensor
    gram: torch.Tensor

    @staticmethod
    def empty(features: int, device: torch.device | None = None) -> Moments:
        return Moments(0, torch.zeros(features, device=device), torch.zeros(features, features, device=device))

    @staticmethod
    def sum(parts: Sequence[Moments]) -> Moments:
        """The sums over the tokens of all parts."""
        total = Moments.empty(len(parts[0].total), parts[0].total.device)
        for part in parts:
            total.count += part.count
            total.total += part.total
            total.gram += part.gram
        return total

    @property
    def norms(self) -> torch.Tensor:
        """‖x_j‖₂ of every feature over all tokens, [features]."""
        return self.gram.diagonal().clamp_min(0).sqrt()

    @property
    def covariance(self) -> torch.Tensor:
        """The mean of (x - mean)·(x - mean)ᵀ, [features, features]."""
        mean = self.total / max(self.count, 1)
        return self.gram / max(self.count, 1) - torch.outer(mean, mean)

    def add(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens.

        Args:
            rows: [tokens, features].
            weights: [tokens], 1 each by default.
        """
        rows = rows.float()
        weighted = rows if weights is None else rows * weights[:, None]
        self.count += len(rows) if weights is None else float(weights.sum())
        self.total += weighted.sum(0)
        self.gram.addmm_(weighted.T, rows)


def real_rows(value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The features of the real tokens, [tokens, features].

    Args:
        value: [..., features].
        mask: [...].
    """
    return value.reshape(-1, value.shape[-1]) if mask is None else value[mask]


def check_finite(program: Program, node: fx.Node, rows: torch.Tensor) -> None:
    """Check for overflow.

    Args:
        rows: [tokens, features], activations or gradients of the node for one sample's real tokens.

    Raises:
        RequirementError: when a value is infinite or NaN.
    """
    if not rows.isfinite().all():
        raise RequirementError(
            f"calibration: activations or gradients of {place(program, node)} are infinite or NaN on the calibration data, in "
            f"{nodes.tensor_type(node).dtype}; give data that the program handles, or keep this part in a wider dtype"
        )


def observe(
    program: Program, data: Sequence[Sample], chosen: Collection[fx.Node], visit: Visit, progress: Progress | None = None
) -> None:
    """Run every sample and call `visit` with each chosen node and the features of its real tokens, [tokens, features]."""
    with torch.no_grad(), kept_state(program):
        for finished, sample in enumerate(data):
            _run(program, sample, chosen, lambda node, value, mask: visit(node, real_rows(value, mask)))
            if progress is not None:
                progress(finished + 1, len(data))


def moments(
    program: Program, data: Sequence[Sample], chosen: Iterable[fx.Node], progress: Progress | None = None
) -> dict[fx.Node, Moments]:
    """The moments of each chosen node's values; choose `input_of(linear)` for the input of a linear layer.

    Raises:
        RequirementError: when a value is infinite or NaN.
    """
    sums = {node: Moments.empty(width(node), nodes.tensor_type(node).device) for node in chosen}

    def add(node: fx.Node, rows: torch.Tensor) -> None:
        check_finite(program, node, rows)
        sums[node].add(rows)

    observe(program, data, sums, add, progress)
    return sums


def observe_gradients(
    program: Program,
    data: Sequence[Sample],
    chosen: Collection[fx.Node],
    visit: VisitGradient,
    progress: Progress | None = None,
) -> None:
    """Run every sample forward and backward; `visit` gets each chosen node, its value, the gradient ∂L/∂value and its mask.

    Value and gradient have the node's shape, and are zero at padding; for the mask see `token_mask`. L is the
    log-likelihood of outputs drawn from the program itself, see above.

    Raises:
        RequirementError: when a value or a gradient is infinite or NaN.
    """
    generator = torch.Generator().manual_seed(0)
    for finished, sample in enumerate(data):
        tracked: list[_Tracked] = []
        with torch.enable_grad(), kept_state(program):
            outputs = _run(program, sample, chosen, partial(_track, tracked))
            likelihood = _likelihood(program, sample, outputs, generator)
            values = [value for _, value, _ in tracked]
            # Outputs that depend on no chosen value have no gradient.
            reached = bool(values) and likelihood.requires_grad
            gradients: Sequence[torch.Tensor | None] = (
                torch.autograd.grad(likelihood, values, allow_unused=True) if reached else [None for _ in values]
            )
        for (node, value, mask), gradient in zip(tracked, gradients, strict=True):
            gradient = torch.zeros_like(value) if gradient is None else gradient
            real = 1.0 if mask is None else mask[..., None]
            for given in (value, gradient):
                check_finite(program, node, real_rows(given.detach(), mask))
            visit(node, value.detach() * real, gradient * real, mask)
        del tracked, outputs, likelihood, values, gradients
        give_back_memory()
        if progress is not None:
            progress(finished + 1, len(data))


def _run(
    program: Program,
    sample: Sample,
    chosen: Collection[fx.Node],
    see: Callable[[fx.Node, torch.Tensor, torch.Tensor | None], None],
) -> list[object]:
    """Run one sample; `see` gets each chosen node, inputs of the program included, its value and its mask."""
    for node, tensor in zip(program.placeholders, sample, strict=True):
        if node in chosen:
            see(node, tensor, token_mask(program, sample, node))

    def look(node: fx.Node, value: object) -> None:
        if node in chosen:
            assert isinstance(value, torch.Tensor)
            see(node, value, token_mask(program, sample, node))

    return program.run(sample, look)


def _track(tracked: list[_Tracked], node: fx.Node, value: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Keep a value for its gradient; when no weight before it is trainable, the autograd graph starts here."""
    if not value.requires_grad:
        value.requires_grad_()
    tracked.append((node, value, mask))


def _likelihood(program: Program, sample: Sample, outputs: Sequence[object], generator: torch.Generator) -> torch.Tensor:
    """The log-likelihood of labels drawn from the program's own outputs, summed over real tokens, without constants."""
    transformer = program.fact(structure)
    heads, vocabularies = set(transformer.lm_heads), {embedding.rows for embedding in transformer.embeddings}
    total = torch.zeros(())
    for node, value in zip(program.leaves, outputs, strict=True):
        if not (isinstance(node, fx.Node) and isinstance(value, torch.Tensor)) or not value.requires_grad or value.dim() == 0:
            continue
        rows = real_rows(value, token_mask(program, sample, node)).float()
        # Hidden states may be as wide as a table of positions is long.
        if width(node) in vocabularies and not heads.isdisjoint(computed_from([node])):
            logs = rows.log_softmax(-1)
            noise = torch.rand(rows.shape, generator=generator).to(rows.device)
            drawn = (logs.detach() - (-noise.clamp_min(1e-20).log()).log()).argmax(-1)
            total = total.to(rows.device) + logs.gather(-1, drawn[:, None]).sum()
        else:
            noise = torch.randn(rows.shape, generator=generator).to(rows.device)
            total = total.to(rows.device) + (rows * noise).sum() / rows.detach().square().mean().sqrt().clamp_min(1e-12)
    return total
