"""Train a program on the task itself: cross-entropy with labels, or a loss of the caller's.

Class and token logits take the cross-entropy with the labels of the batches; tokens with the label -100 do not count. A token
predicts the next label where it sees only those before it, unless labels are an input's tokens, each one place earlier. One
number per row takes the squared error. No teacher is needed. With several ranks a loss of the caller's is taken for a mean over
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import FINITE_LOGITS
from lissom.compiler.training.batches import Batch
from lissom.compiler.training.lm_head import Trunk
from lissom.compiler.training.losses import cross_entropy, labelled_output, next_labels, outputs_of
from lissom.compiler.training.ranks import part_of_mean
from lissom.compiler.training.vocabulary import supervision, vocabulary_loss
from lissom.compiler.transforms.fitting import Fitting, Objective
from lissom.errors import RequirementError

TaskLoss = Callable[[object, torch.Tensor | None], torch.Tensor]
"""Takes the model's output and the labels of the batch, None without; returns one number that can be differentiated."""


@dataclass(frozen=True)
class Finetune(Fitting):
    """Trains weights on labels.

    Attributes:
        loss: in Python, a function of the model's output and the labels; by default the cross-entropy, or the squared error
            where there is one number per row.
    """

    learning_rate: float | None = 5e-5
    loss: TaskLoss | None = None
    requires = (FINITE_LOGITS,)

    def objective(self, edit: Editor, batches: Sequence[Batch], judged: Sequence[Batch]) -> Objective:
        program, given = edit.program, self.loss
        if given is not None:
            whole = Trunk.of(program, {}, self.name())

            def own(batch: Batch) -> torch.Tensor:
                return part_of_mean(given(program.signature.unflatten(whole.run(batch.inputs)), batch.labels))

            return Objective(lambda index, _: own(batches[index]), lambda index: own(judged[index]))
        output = labelled_output(program, outputs_of(program)[0], [*batches, *judged])
        if output is None:
            raise RequirementError("finetune needs labels: give 'labels' in each batch of data=, or pass Finetune(loss=...)")
        head = output.head
        part = Trunk.of(program, {} if head is None else {output.index: head}, self.name())

        def task(batch: Batch) -> torch.Tensor:
            value = part.run(batch.inputs)[output.index]
            assert isinstance(value, torch.Tensor) and batch.labels is not None
            if head is None:
                return cross_entropy(output, value, batch.labels)
            return vocabulary_loss(head, value, supervision(value, labels=next_labels(output, batch.labels)))

        return Objective(lambda index, _: task(batches[index]), lambda index: task(judged[index]))
