"""Losses between a student's and a teacher's outputs, by the form of the output, and the cross-entropy with labels.

Logits (Hinton et al. 2015, Distilling the Knowledge in a Neural Network, §2), with temperature τ, class probabilities
p = softmax(t / τ) of the teacher and q = softmax(s / τ) of the student:

    τ² · KL(p ‖ q) = τ² · Σ p · (log p - log q)

Embeddings, rows of one matrix: 1 - cos(s, t), plus the mean squared difference of the cosines within the batch (Park et al.
2019, Relational Knowledge Distillation, compares pairs of rows). Hidden states: ‖s - t‖² / ‖t - mean t‖², over real tokens.
Scores, one number per row or token, as of a reward model or a regression: mean (s - t)² / variance of t.
https://arxiv.org/abs/1503.02531, https://arxiv.org/abs/1904.05068

Every loss is that of the rows of one process, and of several ranks its part of the loss of all their rows; see `ranks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.nn import functional

from lissom.compiler.analysis.structure.linear import bias_of, input_of, is_attention, is_linear
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.operators import RECURRENCES, is_activation
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.signature import evaluate
from lissom.compiler.training.batches import Batch
from lissom.compiler.training.lm_head import LmHead, lm_head_of
from lissom.compiler.training.ranks import all_rows, mean, total
from lissom.compiler.training.vocabulary import IGNORED
from lissom.errors import RequirementError

Form = Literal["logits", "embeddings", "hidden", "scores"]
_PROJECTION = 64
"""A last layer without a bias and with at least so many outputs per row projects embeddings; a narrower one classifies."""
_SMALL = 1e-12


@dataclass(frozen=True)
class Output:
    """An output of a program that a student can learn.

    Attributes:
        index: among the flat outputs.
        form: its form.
        shifted: whether the label of a token is the token after it.
        head: of token logits whose loss is computed from the hidden state, see `vocabulary`; None for any other output.
    """

    index: int
    node: fx.Node
    form: Form
    shifted: bool = False
    head: LmHead | None = None

    @property
    def compared(self) -> fx.Node:
        """The node whose value a training step gets: the output, or the hidden state that its LM head reads."""
        return self.node if self.head is None else self.head.hidden


def outputs_of(program: Program) -> tuple[list[Output], list[str]]:
    """The outputs that have a form, and a sentence on each of the others."""
    outputs: list[Output] = []
    skipped: list[str] = []
    for index, leaf in enumerate(program.leaves):
        form = _form(program, leaf)
        if form is None or not isinstance(leaf, fx.Node):
            shown = f"'{leaf.name}'" if isinstance(leaf, fx.Node) else repr(leaf)
            skipped.append(
                f"output {index}, {shown}, is neither logits, scores, embeddings nor hidden states, and is not trained on"
            )
        elif all(leaf is not output.node for output in outputs):
            shifted = form == "logits" and nodes.tensor_type(leaf).rank == 3 and _is_causal(program)
            outputs.append(Output(index, leaf, form, shifted, _head(program, leaf) if form == "logits" else None))
    return outputs, skipped


def predicts_next_tokens(outputs: Sequence[Output]) -> bool:
    """True if one of the outputs holds next-token logits."""
    return any(output.shifted for output in outputs)


def _head(program: Program, leaf: fx.Node) -> LmHead | None:
    head = lm_head_of(program, leaf)
    return head if head is not None and head.saves_memory else None


def _form(program: Program, leaf: object) -> Form | None:
    if not nodes.is_tensor(leaf) or leaf.op != "call_function" or not nodes.tensor_type(leaf).dtype.is_floating_point:
        return None
    kind = nodes.tensor_type(leaf)
    if kind.rank == 1 or (kind.rank in (2, 3) and kind.shape[-1] == 1):
        return "scores"
    if kind.rank not in (2, 3) or not isinstance(kind.shape[-1], int):
        return None
    layer, activated = _last_layer(leaf)
    # Above tokens an activation is a soft cap of logits, c · tanh(x / c); above one row it belongs to a pooler.
    if layer is None or (activated and kind.rank == 2) or layer not in program.fact(structure).lm_heads:
        return "embeddings" if kind.rank == 2 else "hidden"
    if kind.rank == 2:
        return "embeddings" if bias_of(layer) is None and kind.shape[-1] >= _PROJECTION else "logits"
    return "hidden" if nodes.tensor_type(input_of(layer)).shape[-1] == kind.shape[-1] else "logits"


def _last_layer(leaf: fx.Node) -> tuple[fx.Node | None, bool]:
    """The linear layer whose result reaches the output through operators of one input, and whether one is an activation."""
    node, activated = leaf, False
    while not is_linear(node):
        inputs = [used for used in node.all_input_nodes if used.op == "call_function" and nodes.is_tensor(used)]
        if len(inputs) != 1 or is_attention(node):
            return None, activated
        activated = activated or is_activation(node)
        node = inputs[0]
    return node, activated


def _is_causal(program: Program) -> bool:
    return bool(program.nodes(*RECURRENCES)) or any(site.mask.causal for site in program.fact(structure).attention)


def real_tokens(program: Program, sample: Sample, output: Output) -> torch.Tensor | None:
    """The real tokens of an output [batch, tokens, features], as booleans [batch, tokens]; None if all are real."""
    return token_mask(program, sample, output.compared) if nodes.tensor_type(output.node).rank == 3 else None


def distance(
    form: Form, output: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """The loss of a student's output against the teacher's, [] in float32.

    Args:
        output: [rows, features] or [rows, tokens, features]; scores may be [rows].
        wanted: likewise.
        real: of the tokens, [rows, tokens].
    """
    if form == "hidden":
        return squared_error(output.float(), wanted.float(), real)
    if real is not None:
        output, wanted = output[real], wanted[real]
    if form == "scores":
        return score_error(output.float().flatten(), wanted.float().flatten())
    output, wanted = output.float().flatten(0, -2), wanted.float().flatten(0, -2)
    return divergence(output, wanted, temperature) if form == "logits" else embedding_distance(output, wanted)


def divergence(output: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """τ² · KL(softmax(wanted / τ) ‖ softmax(output / τ)), the mean over rows; both [rows, classes]."""
    log_q, log_p = (logits.div(temperature).log_softmax(-1) for logits in (output, wanted))
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / total(len(output))


def embedding_distance(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """1 - cosine, the mean over rows, plus the mean squared difference of the cosines between rows; both [rows, features]."""
    output, wanted = (functional.normalize(vectors, dim=-1) for vectors in (output, wanted))
    pairs = (output @ all_rows(output).T - wanted @ all_rows(wanted).T).square().sum() / total(len(output)) ** 2
    # A pair counts twice, once with each row in front: the rows behind, without gradients, stand for the other half.
    return mean(1 - (output * wanted).sum(-1)) + 2 * pairs - pairs.detach()


def score_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """mean (output - wanted)² / variance of wanted; both [rows].

    The variance counts as at least a hundredth of the mean square, since a batch may have one row.
    """
    with torch.no_grad():
        squares = mean(wanted.square())
        spread = (squares - mean(wanted).square()).maximum(0.01 * squares).clamp_min(_SMALL)
    return mean((output - wanted).square()) / spread


def squared_error(output: torch.Tensor, wanted: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
    """‖output - wanted‖² / ‖wanted - mean of wanted‖² over the real rows.

    Args:
        output: [..., features].
        wanted: [..., features].
        real: [...]; None when all rows are real.
    """
    padding = None if real is None else (~real).flatten().nonzero().squeeze(1)
    with torch.no_grad():
        centered = _without(padding, wanted.clone())
        count = wanted[..., 0].numel() - (0 if padding is None else len(padding))
        centered.sub_(total(centered.flatten(0, -2).sum(0)) / total(count))
        centered = _without(padding, centered).flatten()
        spread = total(centered.dot(centered)).clamp_min(_SMALL)
    return _SumOfSquares.apply(output, wanted, padding) / spread


class _SumOfSquares(torch.autograd.Function):
    """Σ (output - wanted)² over the rows without padding, differentiable in output.

    The hidden states of all layers go through it in a step. It takes two passes over memory and one back; a selection by the
    mask and back takes a dozen.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, wanted: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        difference = _without(padding, output - wanted)
        ctx.save_for_backward(difference)
        return difference.flatten().dot(difference.flatten())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2 * gradients[0]), None, None


def _without(padding: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """The contiguous tensor `rows`, [..., features], zeroed in place at the padding: indices of its rows."""
    if padding is not None:
        rows.view(-1, rows.shape[-1]).index_fill_(0, padding, 0.0)
    return rows


def cross_entropy(output: Output, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of logits with labels, [] in float32; squared error where there is one number per row.

    Args:
        logits: [rows, classes] with labels [rows], or [rows, tokens, classes] with labels [rows, tokens]. Tokens with the label
            -100 do not count. Where a token sees only those before it, it predicts the label of the next token.
    """
    logits = logits.float()
    if labels.is_floating_point():
        return mean((logits.reshape(labels.shape) - labels.float()).square())
    following = next_labels(output, labels).flatten()
    counted = max(total(int((following != IGNORED).sum())), 1)
    return functional.cross_entropy(logits.flatten(0, -2), following, ignore_index=IGNORED, reduction="sum") / counted


def next_labels(output: Output, labels: torch.Tensor) -> torch.Tensor:
    """The label that each row of logits predicts, in the shape of the labels: that of the next token where it is shifted."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if output.shifted else labels


def labelled_output(program: Program, outputs: Sequence[Output], batches: Sequence[Batch]) -> Output | None:
    """The output that the labels belong to, with whether they are those of the next token; None without labels.

    Raises:
        RequirementError: when only some batches have labels, or no output fits them.
    """
    known = [batch for batch in batches if batch.labels is not None]
    if not known:
        return None
    if len(known) < len(batches):
        raise RequirementError(
            f"{len(batches) - len(known)} of {len(batches)} batches have no labels; give 'labels' in all batches of data=, or "
            f"in none"
        )
    labels, sizes = known[0].labels, program.signature.sizes_of(known[0].inputs)
    assert labels is not None
    output_shapes: list[torch.Size] = []
    for output in outputs:
        tokens = nodes.tensor_type(output.compared).shape[:-1]
        output_shapes.append(torch.Size(evaluate(size, sizes) for size in (*tokens, nodes.tensor_type(output.node).shape[-1])))
        if _fits(output, output_shapes[-1], labels):
            return replace(output, shifted=_predicts_next(output, known))
    shapes = ", ".join(str(list(shape)) for shape in output_shapes)
    raise RequirementError(f"labels of shape {list(labels.shape)} fit no output: they have the shapes {shapes}")


def _predicts_next(output: Output, batches: Sequence[Batch]) -> bool:
    """True if the label of a token is the token after it.

    The data tell where labels repeat an input of the model: `labels` equal to `input_ids`, as transformers has them for a
    decoder, are those of the next token. Behind it by one token, as for an encoder-decoder's `decoder_input_ids`, they are not.
    """
    if output.form != "logits" or nodes.tensor_type(output.node).rank != 3:
        return False
    for index in range(len(batches[0].inputs)):
        equal, following = (all(_repeats(batch, index, by) for batch in batches) for by in (0, 1))
        if equal != following:
            return equal
    return output.shifted


def _repeats(batch: Batch, index: int, by: int) -> bool:
    """True if the known labels are the tokens of this input, shifted by that many tokens to the front."""
    labels, ids = batch.labels, batch.inputs[index]
    if labels is None or ids.is_floating_point() or ids.shape != labels.shape or labels.dim() != 2:
        return False
    labels, ids = labels[:, : labels.shape[1] - by], ids[:, by:]
    return bool(((labels == ids) | (labels == IGNORED)).all())


def _fits(output: Output, logits: torch.Size, labels: torch.Tensor) -> bool:
    """True when the labels have the form that `cross_entropy` takes."""
    if labels.is_floating_point():
        return labels.numel() == logits.numel()
    return output.form == "logits" and labels.shape == logits[:-1]
