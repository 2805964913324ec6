"""A caller's metric of a decoder: it scores a function without a KV cache, of the next token or of all positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.compiler.training.lm_head import LmHead, lm_head_of
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.generation.decoder import INPUTS
from lissom.generation.decoder import prompts
from lissom.runtime.compiled_model import CompiledModel, own_state

LAST_ALONE = (
    "the decoder computes the logits of the last token alone; compile it with all_logits=True for a metric of all positions"
)
NextToken = Callable[..., torch.Tensor]
"""Takes input_ids and attention_mask of `batch` rows, and all_positions; returns logits."""


class Scorer:
    """The caller's metric as a metric of a program with a KV cache.

    Attributes:
        reads_all: whether it asked for the logits of all positions.
    """

    def __init__(self, metric: Callable[[NextToken], float], batch: int, max_length: int) -> None:
        self.reads_all = False
        self.metric = metric
        self._sizes = batch, max_length
        self._first: float | None = None

    def __call__(self, program: Program | CompiledModel) -> float:
        first, self._first = self._first, None
        return self._score(program) if first is None else first

    def try_on(self, program: Program) -> None:
        """Score the captured program, to know what the metric reads; the next call, which is for it too, returns this score."""
        try:
            with torch.no_grad(), kept_state(program):
                self._first = self._score(program)
        # The metric is the caller's code, and may raise anything; the pipeline calls it again and explains the error.
        except Exception:
            self._first = None

    def _score(self, program: Program | CompiledModel) -> float:
        scored = _Scored(program, *self._sizes)
        try:
            return self.metric(scored)
        finally:
            self.reads_all |= scored.reads_all


@dataclass
class _Scored:
    """A decoder's program as a function of whole texts.

    Attributes:
        reads_all: whether logits of all positions were asked for.
    """

    program: Program | CompiledModel
    batch: int
    max_length: int
    reads_all: bool = False

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, all_positions: bool = False
    ) -> torch.Tensor:
        """The logits of the next token, [batch, vocabulary]; with all_positions those of every token of the texts.

        Args:
            input_ids: [batch, tokens].
            attention_mask: [batch, tokens].
            all_positions: returns [batch, tokens, vocabulary], zeros at padding.

        Raises:
            InputError: if the ids have another form, or a text is too long.
        """
        sample = self._sample(input_ids, attention_mask)
        kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        longest = int(kept.sum(1).max())
        if longest > self.max_length:
            raise InputError(f"metric gave a text of {longest} tokens; this decoder reads {self.max_length} or fewer")
        if not all_positions:
            with own_state(self.program):
                (logits,) = self.program.run(sample)
            assert isinstance(logits, torch.Tensor)
            return logits[:, -1]
        self.reads_all = True
        with own_state(self.program):
            all_logits = self._all_logits(sample)
        logits = all_logits.new_zeros(*input_ids.shape, all_logits.shape[-1])
        for row, seen in enumerate(kept):
            # Rows without their padding, which `prompts` puts on the left.
            logits[row, seen] = all_logits[row, all_logits.shape[1] - int(seen.sum()) :]
        return logits

    def _sample(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Sample:
        given = {INPUTS[0]: input_ids} | ({} if attention_mask is None else {INPUTS[1]: attention_mask})
        if not isinstance(input_ids, torch.Tensor):
            raise InputError(f"metric gave a {type(input_ids).__name__} as input_ids; give a tensor, [{self.batch}, tokens]")
        samples = prompts([given], self.batch, self.max_length) if input_ids.shape[:1] == (self.batch,) else []
        if len(samples) != 1 or (attention_mask is not None and not bool(attention_mask.any(1).all())):
            raise InputError(
                f"metric gave input_ids of {list(input_ids.shape)}, and this decoder reads [{self.batch}, tokens]; score it on "
                f"{self.batch} rows at once, or compile with another batch="
            )
        return samples[0]

    def _all_logits(self, sample: Sample) -> torch.Tensor:
        """The logits of all tokens of a sample, [batch, tokens, vocabulary].

        Raises:
            UnsupportedError: if the program computes those of the last token alone.
        """
        program, head, watched = self.program, None, list[torch.Tensor]()
        if isinstance(program, Program):
            head = lm_head = lm_head_of(program, program.leaves[0])

            def observe(node: fx.Node, value: object) -> None:
                if lm_head is not None and node is lm_head.hidden and isinstance(value, torch.Tensor):
                    watched.append(value)

            (logits,) = program.run(sample, observe)
        else:
            (logits,) = program.run(sample)
        tokens = sample[0].shape[1]
        assert isinstance(logits, torch.Tensor)
        if logits.shape[1] == tokens:
            return logits
        if head is None or not watched or watched[0].shape[1] != tokens:
            raise UnsupportedError(LAST_ALONE)
        return _logits(head, watched[0])


def _logits(head: LmHead, hidden: torch.Tensor) -> torch.Tensor:
    """The logits, [batch, tokens, vocabulary], of hidden states [batch, tokens, width]."""
    weight, bias = head.weights()
    return head.finish(torch.nn.functional.linear(hidden.flatten(0, 1), weight, bias)).unflatten(0, hidden.shape[:2])
