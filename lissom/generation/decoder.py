"""A compiled decoder: keeps the KV cache between calls, and returns the logits of the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy
import torch

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.types import Size, TensorType, fixed, substitute
from lissom.compiler.training.vocabulary import IGNORED
from lissom.driver.options import LABELS
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.generation.decoder import INPUTS
from lissom.frontends.generation.state_names import is_kv_cache
from lissom.inspect.report import Report
from lissom.runtime.compiled_model import CompiledModel
from lissom.runtime.hosted_model import FixedModule
from lissom.runtime.tracers import refuse_tracer, untraced


class Decoder(FixedModule):
    """A causal language model with its KV cache; every call appends its tokens to the cache.

    A decoder holds one conversation: calls from several threads would share its cache.

    Attributes:
        program: the optimized program.
        report: what every step did; prints as a table.
        backend: the name of the backend.
        batch: the number of sequences.
        max_length: the capacity of the cache in tokens.
        length: the tokens it holds now.
        all_logits: a call returns the logits of all its tokens, not only of the last.
        last_logits: the most tokens of a call whose logits the program computes.
        is_croppable: whether `crop` can take tokens away: not from the state of a recurrence, which has no slot for each of
            them.

    Examples:
        >>> import torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> decoder = lissom.compile_generation(LlamaForCausalLM(config), max_length=32)
        >>> logits = decoder.step(torch.tensor([[1, 2, 3]]))
        >>> decoder.step(logits.argmax(-1, keepdim=True)).shape, decoder.length
        (torch.Size([1, 50]), 4)
    """

    def __init__(self, compiled: CompiledModel) -> None:
        super().__init__(compiled.program)
        self.compiled = compiled
        self.is_croppable = all(map(is_kv_cache, compiled.program.state))
        self.length = 0
        _, mask, *_ = (leaf.type for leaf in compiled.program.signature.tensors)
        self.batch, self.max_length = map(fixed, mask.shape)
        self.last_logits = _largest(_logits(compiled.program).shape[1], self.max_length)
        self.all_logits = self.last_logits == self.max_length
        self._mask = torch.ones(self.batch, self.max_length, dtype=torch.int64, device=self.device)
        self._start = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._counted = torch.arange(self.max_length, device=self.device).expand(self.batch, self.max_length)
        self._padded = self._unfinished = False
        self._source: Sample = []

    @property
    def report(self) -> Report:
        return self.compiled.report

    @property
    def backend(self) -> str:
        return self.compiled.backend

    def step(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Append tokens to the KV cache; returns the logits of the next token, [batch, vocabulary].

        With all_logits it returns those of every token, [batch, tokens, vocabulary]. After an error the cache is unchanged.

        Args:
            input_ids: [batch, tokens], the whole prompt or a single token.
            attention_mask: [batch, tokens], 0 for padding, on the left of a prompt.

        Raises:
            InputError: if the batch size differs, the cache is full, or a token id is out of range.
        """
        logits = self._read(input_ids, attention_mask)
        return logits if self.all_logits else logits[:, -1]

    def step_all(self, input_ids: torch.Tensor) -> torch.Tensor:
        """As `step`, with the logits of the last `last_logits` tokens of the call, or of all if it has fewer.

        Returns:
            [batch, tokens, vocabulary].

        Raises:
            InputError: as `step`.
        """
        return self._read(input_ids, None)

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Empty the KV cache, then append a prompt, [batch, tokens]; returns as `step`.

        Raises:
            InputError: as `step`.
        """
        self.reset()
        return self.step(input_ids)

    def slots(self, input_ids: torch.Tensor) -> int:
        """The slots of the KV cache that a prompt, [batch, tokens], takes."""
        return input_ids.shape[1]

    def reset(self) -> None:
        """Empty the KV cache, and the state of recurrent layers."""
        self.length, self._unfinished = 0, False
        for name, tensor in self.compiled.state().items() if not self.is_croppable else ():
            if not is_kv_cache(name):
                tensor.zero_()
        if self._padded:
            self._mask.fill_(1)
            self._padded = False

    def crop(self, length: int) -> None:
        """Keep only the first `length` tokens of the KV cache.

        Raises:
            InputError: if it holds fewer.
            UnsupportedError: for a model with recurrent layers, unless length is 0.
        """
        if not isinstance(length, int) or not 0 <= length <= self.length:
            raise InputError(
                f"the decoder has read {self.length} tokens, and was to keep {length!r:.80}; keep 0 to {self.length}"
            )
        if length == 0:
            self.reset()
        elif length < self.length and not self.is_croppable:
            raise UnsupportedError(
                f"the state of a recurrence cannot be cropped ({self.length} tokens are read, {length} were to stay); "
                f"reset() the decoder, and read the text again"
            )
        self.length = length
        self._mask[:, length:] = 1

    def reorder(self, rows: torch.Tensor) -> None:
        """Replace the KV cache of row i by that of row `rows[i]`, for beam search.

        Args:
            rows: [batch].

        Raises:
            InputError: for a row index out of range.
        """
        if not isinstance(rows, torch.Tensor) or rows.dtype not in (torch.int32, torch.int64) or rows.shape != (self.batch,):
            raise InputError(f"rows is {rows!r:.80}; give a tensor of {self.batch} row numbers, one for each row")
        if bool(((rows < 0) | (rows >= self.batch)).any()):
            raise InputError(f"rows is {rows.tolist()!s:.80}; this decoder has rows 0 to {self.batch - 1}")
        rows = rows.to(self.device)
        self._mask.copy_(self._mask[rows])
        for name, tensor in self.compiled.state().items():
            filled = tensor[:, :, : self.length] if is_kv_cache(name) else tensor
            filled.copy_(filled[rows])

    def _read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The logits of a call, [batch, tokens or 1, vocabulary]. A call that fails leaves the padding mask unchanged.

        Raises:
            InputError: as `step`.
            UnsupportedError: if a call was interrupted while it wrote the state of recurrent layers.
        """
        if torch.compiler.is_dynamo_compiling():
            return untraced(self._read, (input_ids, attention_mask), {})
        with self.compiled.refusals():
            refuse_tracer(self.program.name)
            tokens = self._check(input_ids)
        if self._unfinished:
            raise UnsupportedError("a call was interrupted while it wrote the state of recurrent layers; reset() the decoder")
        # Embeddings take int32 and int64 ids, and the program is captured with int64.
        ids = input_ids if input_ids.dtype is torch.int64 else input_ids.to(torch.int64)
        if attention_mask is None:
            return self._run(ids, tokens)
        mask, padded = self._mask.clone(), self._padded
        try:
            with self.compiled.refusals():
                self._hide(attention_mask, tokens)
            return self._run(ids, tokens)
        except BaseException:
            self._mask.copy_(mask)
            self._padded = padded
            raise

    def _check(self, input_ids: torch.Tensor) -> int:
        """The number of tokens of a call. Raises InputError."""
        if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int32, torch.int64):
            kind = str(input_ids.dtype) if isinstance(input_ids, torch.Tensor) else f"a {type(input_ids).__name__}"
            raise InputError(f"input_ids is {kind}; give a tensor of token ids, torch.int64 or torch.int32")
        if input_ids.device != self.device or input_ids.layout is not torch.strided or input_ids.is_nested:
            kind = f"on {input_ids.device}" if input_ids.device != self.device else "not dense"
            raise InputError(f"input_ids is {kind}, and this decoder reads dense tensors on {self.device}; pass such a tensor")
        shape = input_ids.shape
        if len(shape) != 2 or shape[0] != self.batch:
            raise InputError(
                f"input_ids is {list(shape)}, and this decoder reads [{self.batch}, tokens]; "
                f"for other batches compile it again with batch="
            )
        if shape[1] < 1 or self.length + shape[1] > self.max_length:
            what = f"{self.length} are read and {shape[1]} more were given" if shape[1] else "none were given"
            raise InputError(
                f"the cache holds {self.max_length} tokens, {what}; reset() or crop() it, or compile with a larger max_length"
            )
        return shape[1]

    def _hide(self, attention_mask: torch.Tensor, tokens: int) -> None:
        """Record the padding positions.

        Args:
            attention_mask: of the new tokens, or of all tokens so far.

        Raises:
            InputError: if the mask has another form.
        """
        start, end = self.length, self.length + tokens
        if not isinstance(attention_mask, torch.Tensor):
            raise InputError(
                f"attention_mask is a {type(attention_mask).__name__}; give a tensor, or None where nothing is padding"
            )
        begin = {end: 0, tokens: start}.get(attention_mask.shape[-1]) if attention_mask.dim() == 2 else None
        if begin is None or attention_mask.shape[0] != self.batch:
            raise InputError(
                f"attention_mask is {list(attention_mask.shape)}; give [{self.batch}, {tokens}] for the new tokens"
                + (f", or [{self.batch}, {end}] for all" if start else "")
            )
        if attention_mask.is_floating_point() or attention_mask.is_complex():
            raise InputError(
                f"attention_mask is {attention_mask.dtype}; give integers or booleans, 1 for tokens and 0 for padding"
            )
        self._mask[:, begin:end] = attention_mask != 0
        self._padded = True

    def _run(self, input_ids: torch.Tensor, tokens: int) -> torch.Tensor:
        start, end = self.length, self.length + tokens
        if self._padded:
            positions = self._mask[:, :end].cumsum(1)[:, start:].sub_(1).clamp_min_(0)
        else:
            positions = self._counted[:, start:end]
        self._start.fill_(start)
        inputs = [input_ids, self._mask, positions, self._start, *self._source]
        self._unfinished = not self.is_croppable
        try:
            (logits,) = self.compiled.run(inputs)
        except InputError:  # ids that no table has: found before anything is written
            self._unfinished = False
            raise
        self.length, self._unfinished = end, False
        assert isinstance(logits, torch.Tensor)
        return logits

    def __repr__(self) -> str:
        filled = f"{self.length} of {self.max_length} tokens"
        return f"Decoder({self.program.name}, {filled}, backend='{self.backend}')"


def _logits(program: Program) -> TensorType:
    (leaf,) = program.leaves
    return nodes.tensor_type(leaf)


def vocabulary_size(program: Program) -> int:
    """The number of logits of a token."""
    return fixed(_logits(program).shape[-1])


def _largest(size: Size, tokens: int) -> int:
    """A size of a program in a call with so many tokens."""
    if isinstance(size, int):
        return size
    return int(substitute(size, {symbol: tokens for symbol in size.free_symbols if isinstance(symbol, sympy.Symbol)}))


Prompts = Sequence[torch.Tensor | Mapping[str, object]]
"""Texts: token ids, [rows, tokens], or mappings with input_ids, and attention_mask and labels of the same shape if any."""


def prompts(batches: Prompts, batch: int, max_length: int) -> list[Sample]:
    """Texts as inputs of a decoder with an empty KV cache: rows without their padding, `batch` at a time.

    Raises:
        InputError: if a batch holds no token ids.
    """
    return [sample for sample, _ in labelled_prompts(batches, batch, max_length)]


def labelled_prompts(
    batches: Prompts, batch: int, max_length: int, *, fill: bool = True
) -> list[tuple[Sample, torch.Tensor | None]]:
    """Inputs as of `prompts`, each with the labels of its tokens, [batch, tokens], -100 at padding; None if a row has none.

    Args:
        fill: whether the last group is filled up with the first rows; it is left out otherwise.

    Raises:
        InputError: as `prompts`.
    """
    rows = rows_of(batches, max_length)
    groups = ([rows[index] for index in group] for group in row_groups(len(rows), batch, fill=fill))
    return [(_left_padded([ids for ids, _ in group], max_length), _left_padded_labels(group)) for group in groups]


def rows_of(batches: Prompts, max_length: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Texts without their padding, [tokens] each, at most `max_length`, with the labels of their tokens where given.

    Raises:
        InputError: as `prompts`.
    """
    rows: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for given in batches:
        ids = given.get(INPUTS[0]) if isinstance(given, Mapping) else given
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise InputError("data= of a decoder holds token ids [rows, tokens], or mappings with input_ids and attention_mask")
        kept = _like(given, INPUTS[1], ids)
        labels = _like(given, LABELS, ids)
        kept = torch.ones_like(ids, dtype=torch.bool) if kept is None else kept.bool()
        for row, seen in enumerate(kept):
            if bool(seen.any()):
                rows.append((ids[row][seen][:max_length], None if labels is None else labels[row][seen][:max_length]))
    return rows


def row_groups(count: int, batch: int, *, fill: bool = True) -> list[list[int]]:
    """The numbers of `count` rows, `batch` at a time; the last group is filled up with the first rows, or left out."""
    starts = range(0, count if fill else count - batch + 1, batch)
    return [[(first + offset) % count for offset in range(batch)] for first in starts]


def _like(given: torch.Tensor | Mapping[str, object], name: str, ids: torch.Tensor) -> torch.Tensor | None:
    """The tensor of that name in a batch; None without it. Raises InputError if it has another shape than the ids."""
    tensor = given.get(name) if isinstance(given, Mapping) else None
    if not isinstance(tensor, torch.Tensor):
        return None
    if tensor.shape != ids.shape:
        what = f"{name if name == LABELS else f'an {name}'} of {list(tensor.shape)}"
        raise InputError(f"data= has {what} for input_ids of {list(ids.shape)}; give both alike")
    return tensor


def _left_padded_labels(rows: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor | None:
    known = [labels for _, labels in rows if labels is not None]
    if len(known) < len(rows):
        return None
    tokens = max(labels.numel() for labels in known)
    return torch.stack([torch.nn.functional.pad(labels, (tokens - labels.numel(), 0), value=IGNORED) for labels in known])


def unpadded(ids: torch.Tensor, max_length: int) -> dict[str, torch.Tensor]:
    """Texts of one length, [rows, tokens], as inputs of a decoder with an empty KV cache, by name."""
    rows, tokens = ids.shape
    mask = torch.ones(rows, max_length, dtype=torch.int64, device=ids.device)
    positions = torch.arange(tokens, device=ids.device).expand(rows, -1).contiguous()
    start = torch.zeros(1, dtype=torch.int64, device=ids.device)
    return dict(zip(INPUTS, (ids, mask, positions, start), strict=True))


def _left_padded(rows: Sequence[torch.Tensor], max_length: int) -> Sample:
    tokens = max(row.numel() for row in rows)
    ids = torch.zeros(len(rows), tokens, dtype=torch.int64, device=rows[0].device)
    mask = torch.ones(len(rows), max_length, dtype=torch.int64, device=rows[0].device)
    for index, row in enumerate(rows):
        ids[index, tokens - row.numel() :] = row
        mask[index, : tokens - row.numel()] = 0
    positions = (mask[:, :tokens].cumsum(1) - 1).clamp_min(0)
    return [ids, mask, positions, torch.zeros(1, dtype=torch.int64, device=ids.device)]
