"""Train a program to give what it gave before the lossy passes.

The teacher is the program before the first lossy pass, the student is the program as it is now, and both run on the calibration
data. With y the labels, τ the temperature, t and s the outputs of teacher and student, and h their hidden states,

    L = α · CE(y, s) + (1 - α) · D(t, s) + hidden · Σ ‖h_s - h_t‖² / ‖h_t - mean h_t‖² / places

D follows the form of the output: τ² · KL for class and token logits, 1 - cosine and the difference of cosines within the batch
for embeddings, the squared error for hidden states and scores. Without labels α is 0. Hinton et al. 2015, Distilling the
Knowledge in a Neural Network; Jiao et al. 2020, TinyBERT, has the terms of hidden states. https://arxiv.org/abs/1503.02531,
https://arxiv.org/abs/1909.10351

The first part of the run is blockwise, but for decoders: each residual add learns the teacher's value from the teacher's value
at the one before. Weights that are quantized in the graph learn through the rounding, which makes the pass quantization-aware.
Zeros of pruned matrices, tied weights and factors stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FINITE_LOGITS
from lissom.compiler.training.batches import Batch
from lissom.compiler.training.cache import TargetCache
from lissom.compiler.training.losses import Output, labelled_output, outputs_of, predicts_next_tokens
from lissom.compiler.training.teacher import Labels, Targets, Teacher
from lissom.compiler.transforms.fitting import Fitting, Objective, load_kernels_for
from lissom.errors import RequirementError


@dataclass(frozen=True)
class Distill(Fitting):
    """Trains weights so that the outputs are those from before the lossy passes.

    Attributes:
        alpha: the weight of the cross-entropy with labels; it has no effect where batches have none.
        temperature: divides logits before the softmax of both programs; none takes 2, or 1 for the logits of next tokens.
        hidden: the weight of the hidden states.
        blockwise: the fraction of the run in which blocks learn by themselves; none takes 0.1, or 0 for the logits of next
            tokens.
    """

    alpha: float = 0.5
    temperature: float | None = None
    hidden: float = 1.0
    blockwise: float | None = None
    requires = (FINITE_LOGITS,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; give a fraction from 0 to 1")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; give a number above 0")
        if self.hidden < 0:
            raise ValueError(f"hidden is {self.hidden}; give 0 or more")
        if self.blockwise is not None and not 0 <= self.blockwise <= 1:
            raise ValueError(f"blockwise is {self.blockwise}; give a fraction from 0 to 1")

    def objective(self, edit: Editor, batches: Sequence[Batch], judged: Sequence[Batch]) -> Objective:
        student = edit.program
        if edit.reference is None:
            raise RequirementError(
                "distill has no teacher: no lossy pass came before it, so there is nothing to recover; put it after the pass "
                "whose loss it is to recover"
            )
        outputs, skipped = outputs_of(student)
        for sentence in skipped:
            edit.note(sentence)
        if not outputs:
            raise RequirementError(
                "distill: no output is logits, scores, embeddings or hidden states, so there is nothing to learn"
            )
        teacher = Teacher.of(edit.reference, outputs, student, self.name())
        if teacher.heads:
            load_kernels_for(edit, "the losses of token logits")
        if teacher.residuals and self.hidden:
            edit.note(f"hidden states are compared at {len(teacher.residuals)} residual adds")
        every, cache = [*batches, *judged], TargetCache()
        temperature, blockwise = (1.0, 0.0) if predicts_next_tokens(outputs) else (2.0, 0.1)
        temperature = temperature if self.temperature is None else self.temperature
        blockwise = blockwise if self.blockwise is None else self.blockwise
        labelled = labelled_output(student, teacher.outputs, every)
        distillation = _Distillation(self, temperature, blockwise, teacher, every, labelled, cache)
        held_out = partial(distillation.end_to_end, hidden=0.0)

        def close() -> None:
            if (shortage := cache.shortage()) is not None:
                edit.note(shortage)
            cache.close()

        return Objective(distillation.loss, lambda index: held_out(len(batches) + index), close)


@dataclass(frozen=True)
class _Distillation:
    """The losses of the batches.

    Attributes:
        temperature: the option, or its default.
        blockwise: the option, or its default.
        labelled: the output that labels belong to, if any.
    """

    options: Distill
    temperature: float
    blockwise: float
    teacher: Teacher
    batches: Sequence[Batch]
    labelled: Output | None
    cache: TargetCache

    def loss(self, index: int, done: float) -> torch.Tensor:
        """The loss of a training batch: of blocks by themselves at the start, then of the whole."""
        if done >= self.blockwise or not self.teacher.residuals:
            return self.end_to_end(index, hidden=self.options.hidden)
        inputs = self.batches[index].inputs
        return self.teacher.blockwise(inputs, self._targets(index), temperature=self.temperature)

    def end_to_end(self, index: int, *, hidden: float) -> torch.Tensor:
        """The loss of the outputs, with `hidden` times that of the hidden states."""
        batch, labels = self.batches[index], None
        if self.labelled is not None and batch.labels is not None:
            labels = Labels(self.labelled, batch.labels, self.options.alpha)
        targets = self._targets(index)
        return self.teacher.end_to_end(batch.inputs, targets, temperature=self.temperature, hidden=hidden, labels=labels)

    def _targets(self, index: int) -> Targets:
        return self.cache.targets(index, lambda: self.teacher.targets(self.batches[index].inputs))
