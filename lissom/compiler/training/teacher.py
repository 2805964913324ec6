"""Distillation targets: the teacher's outputs, and its hidden states at the residual adds that the student has too.

Nodes keep their names through passes, so the residual adds of a student are found in the teacher by name, whatever was removed
between them. Two losses are made of them:

- end to end: the distance of the outputs, plus that of the hidden states;
- blockwise: each residual add gets the teacher's value in its place once its error is taken, so that every block learns to
  give the teacher's output on the teacher's input, with a short backward pass and no drift. Where layers were removed, the
  block after them learns their part.

Logits over a large vocabulary are compared by `vocabulary`: of the teacher's only its last hidden state is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.training.lm_head import LmHead, Trunk, lm_head_of
from lissom.compiler.training.losses import Output, cross_entropy, distance, next_labels, real_tokens
from lissom.compiler.training.vocabulary import supervision, vocabulary_loss
from lissom.errors import RequirementError


@dataclass(frozen=True)
class Targets:
    """The distillation targets of one batch.

    Attributes:
        outputs: by their index; the last hidden state for logits over a large vocabulary.
        hidden: hidden states by the name of the residual add.
        real: for each of both which tokens are no padding, by the same keys; None when all are real.
    """

    outputs: Mapping[int, torch.Tensor]
    hidden: Mapping[str, torch.Tensor]
    real: Mapping[int | str, torch.Tensor | None]


@dataclass(frozen=True)
class Labels:
    """The labels of a batch.

    Attributes:
        output: that they belong to.
        alpha: the weight of their cross-entropy against all other losses.
    """

    output: Output
    values: torch.Tensor
    alpha: float


@dataclass(frozen=True)
class Teacher:
    """The program before the first lossy pass, its student, and the places where they are compared.

    Attributes:
        runs: the part of the teacher that a step runs, see `Trunk`.
        student: that of the student.
        outputs: of the student, that are compared.
        heads: of the teacher, by the index of those outputs that have one.
        residuals: the residual adds that both have, by name.
    """

    program: Program
    runs: Trunk
    student: Trunk
    outputs: Sequence[Output]
    heads: Mapping[int, LmHead]
    residuals: Mapping[str, fx.Node]

    @classmethod
    def of(cls, program: Program, outputs: Sequence[Output], student: Program, name: str) -> Teacher:
        """The teacher of a student.

        Args:
            name: of the pass, for the error.

        Raises:
            RequirementError: when an output of the student has another shape.
        """
        theirs = program.leaves
        for output in outputs:
            wanted, given = nodes.tensor_type(theirs[output.index]), nodes.tensor_type(output.node)
            if wanted.shape[-1] != given.shape[-1] or wanted.rank != given.rank:
                raise RequirementError(
                    f"{name}: output {output.index} has {given.shape[-1]} features, and had {wanted.shape[-1]} before the "
                    f"first lossy pass, so there is nothing to compare it with; use finetune with labels"
                )
        heads = {output.index: head for output in outputs if (head := _counterpart(program, theirs[output.index], output))}
        outputs = [output if output.index in heads else replace(output, head=None) for output in outputs]
        shapes = {node.name: nodes.tensor_type(node).shape for node in student.fact(structure).residuals}
        adds = program.fact(structure).residuals
        alike = {node.name: node for node in adds if shapes.get(node.name) == nodes.tensor_type(node).shape}
        own = {output.index: output.head for output in outputs if output.head is not None}
        return cls(program, Trunk.of(program, heads, name), Trunk.of(student, own, name), outputs, heads, alike)

    def targets(self, sample: Sample) -> Targets:
        """The distillation targets of one batch, computed by the teacher."""
        hidden: dict[str, torch.Tensor] = {}

        def observe(node: fx.Node, value: object) -> None:
            if node.name in self.residuals and isinstance(value, torch.Tensor):
                hidden[node.name] = value

        with torch.no_grad():
            values = self.runs.run(sample, observe)
        outputs = {output.index: value for output in self.outputs if isinstance(value := values[output.index], torch.Tensor)}
        real: dict[int | str, torch.Tensor | None] = {
            output.index: real_tokens(self.program, sample, output) for output in self.outputs
        }
        real |= {name: token_mask(self.program, sample, node) for name, node in self.residuals.items()}
        return Targets(outputs, hidden, real)

    def end_to_end(
        self, sample: Sample, targets: Targets, *, temperature: float, hidden: float, labels: Labels | None = None
    ) -> torch.Tensor:
        """The loss of all outputs plus `hidden` times that of the hidden states, with (1 - alpha); plus that of the labels."""
        return self._compared(sample, targets, temperature, hidden, labels, replaces=False)

    def blockwise(self, sample: Sample, targets: Targets, *, temperature: float) -> torch.Tensor:
        """The loss of every block on the teacher's input, and of the outputs on the teacher's last hidden state.

        Logits over a large vocabulary are left out where blocks learn: they would train one norm for half the time of a step.
        """
        return self._compared(sample, targets, temperature, 1.0, None, replaces=True)

    def _compared(
        self, sample: Sample, targets: Targets, temperature: float, hidden: float, labels: Labels | None, *, replaces: bool
    ) -> torch.Tensor:
        errors: list[torch.Tensor] = []

        def observe(node: fx.Node, value: object) -> object:
            wanted = targets.hidden.get(node.name)
            if wanted is None or not isinstance(value, torch.Tensor):
                return None
            errors.append(distance("hidden", value, wanted, targets.real[node.name]))
            return wanted.to(value.dtype) if replaces else None

        values = self.student.run(sample, observe if hidden and targets.hidden else None)
        share = 1.0 if labels is None else 1 - labels.alpha
        total = torch.zeros(())
        for output in self.outputs:
            if replaces and output.head is not None and any(error.requires_grad for error in errors):
                continue
            value = values[output.index]
            assert isinstance(value, torch.Tensor)
            own = labels if labels is not None and labels.output.index == output.index else None
            total = total + self._loss(output, value, targets, temperature, share, own)
        if errors:
            total = total + share * hidden * torch.stack(errors).mean()
        return total

    def _loss(
        self, output: Output, value: torch.Tensor, targets: Targets, temperature: float, share: float, labels: Labels | None
    ) -> torch.Tensor:
        """The loss of one output, with the share of the teacher, and of its labels if it has any."""
        wanted, real = targets.outputs[output.index], targets.real[output.index]
        if output.head is None:
            loss = share * distance(output.form, value, wanted, real, temperature)
            return loss if labels is None else loss + labels.alpha * cross_entropy(labels.output, value, labels.values)
        given, alpha = (None, 0.0) if labels is None else (next_labels(labels.output, labels.values), labels.alpha)
        learned = supervision(
            value,
            (self.heads[output.index], wanted),
            real=real,
            temperature=temperature,
            share=share,
            labels=given,
            alpha=alpha,
        )
        return vocabulary_loss(output.head, value, learned)


def _counterpart(program: Program, leaf: object, output: Output) -> LmHead | None:
    """The teacher's LM head for an output of the student that has one, where both give logits for the same tokens."""
    if output.head is None or (head := lm_head_of(program, leaf)) is None:
        return None
    tokens, wanted = (nodes.tensor_type(lm_head.hidden).shape[:2] for lm_head in (output.head, head))
    return head if tokens == wanted else None
