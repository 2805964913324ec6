"""What a student learns from its teacher: the outputs, and the hidden states at the residual adds both have.

Nodes keep their names through passes, so the residual adds of a student are found in the teacher by name, whatever was removed
between them. Two losses are made of them:

- end to end: the distance of the outputs, plus that of the hidden states;
- blockwise: each residual add gets the teacher's value in its place once its error is taken, so that every block learns to
  give the teacher's output on the teacher's input, with a short backward pass and no drift. Where layers were removed, the
  block after them learns their part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.training.losses import Output, distance, real_tokens
from lissom.errors import RequirementError


@dataclass(frozen=True)
class Targets:
    """What the teacher gives for one batch.

    outputs: by their index. hidden: hidden states by the name of the residual add. real: for each of both which tokens are no
    padding, by the same keys; None when all are real.
    """

    outputs: Mapping[int, torch.Tensor]
    hidden: Mapping[str, torch.Tensor]
    real: Mapping[int | str, torch.Tensor | None]


@dataclass(frozen=True)
class Teacher:
    """The program before the first lossy pass, and the places where a student is compared with it.

    outputs: that are compared. residuals: the residual adds that both have, by name.
    """

    program: Program
    outputs: Sequence[Output]
    residuals: Mapping[str, fx.Node]

    @classmethod
    def of(cls, program: Program, outputs: Sequence[Output], student: Program, name: str) -> Teacher:
        """name: of the pass, for the error. Raises: RequirementError when an output of the student has another shape."""
        theirs: Sequence[object] = program.output.args[0]  # pyright: ignore[reportAssignmentType]
        for output in outputs:
            wanted, found = nodes.tensor_type(theirs[output.index]), nodes.tensor_type(output.node)
            if wanted.shape[-1] != found.shape[-1] or wanted.rank != found.rank:
                raise RequirementError(
                    f"{name}: output {output.index} has {found.shape[-1]} features, and had {wanted.shape[-1]} before the "
                    f"first lossy pass, so there is nothing to compare it with; use finetune with labels"
                )
        shapes = {node.name: nodes.tensor_type(node).shape for node in student.fact(structure).residuals}
        adds = program.fact(structure).residuals
        alike = {node.name: node for node in adds if shapes.get(node.name) == nodes.tensor_type(node).shape}
        return cls(program, outputs, alike)

    def targets(self, sample: Sample) -> Targets:
        """What a student learns from one batch."""
        hidden: dict[str, torch.Tensor] = {}

        def observe(node: fx.Node, value: object) -> None:
            if node.name in self.residuals and isinstance(value, torch.Tensor):
                hidden[node.name] = value

        with torch.no_grad():
            found = self.program.run(sample, observe)
        outputs = {output.index: value for output in self.outputs if isinstance(value := found[output.index], torch.Tensor)}
        real: dict[int | str, torch.Tensor | None] = {
            output.index: real_tokens(self.program, sample, output) for output in self.outputs
        }
        real |= {name: token_mask(self.program, sample, node) for name, node in self.residuals.items()}
        return Targets(outputs, hidden, real)

    def end_to_end(
        self, student: Program, sample: Sample, targets: Targets, *, temperature: float, hidden: float
    ) -> tuple[torch.Tensor, list[object]]:
        """The loss of all outputs plus `hidden` times that of the hidden states; and the student's outputs."""
        return self._compared(student, sample, targets, temperature, hidden, replaces=False)

    def blockwise(self, student: Program, sample: Sample, targets: Targets, *, temperature: float) -> torch.Tensor:
        """The loss of every block on the teacher's input, and of the outputs on the teacher's last hidden state."""
        return self._compared(student, sample, targets, temperature, 1.0, replaces=True)[0]

    def _compared(
        self, student: Program, sample: Sample, targets: Targets, temperature: float, hidden: float, *, replaces: bool
    ) -> tuple[torch.Tensor, list[object]]:
        errors: list[torch.Tensor] = []

        def observe(node: fx.Node, value: object) -> object:
            wanted = targets.hidden.get(node.name)
            if wanted is None or not isinstance(value, torch.Tensor):
                return None
            errors.append(distance("hidden", value, wanted, targets.real[node.name]))
            return wanted if replaces else None

        found = student.run(sample, observe if hidden and targets.hidden else None)
        total = torch.zeros(())
        for output in self.outputs:
            value, real = found[output.index], targets.real[output.index]
            assert isinstance(value, torch.Tensor)
            total = total + distance(output.form, value, targets.outputs[output.index], real, temperature)
        if errors:
            total = total + hidden * torch.stack(errors).mean()
        return total, found
