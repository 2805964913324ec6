"""A compiled decoder for several sequences of unlike length in one program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lissom.artifacts.model_files import Saveable
from lissom.compiler.ir.types import fixed
from lissom.errors import InputError
from lissom.generation.batching import Batching, Text
from lissom.generation.decoder import vocabulary_size
from lissom.generation.directory import Parts, PoolSizes, save
from lissom.generation.sampling import Sampling
from lissom.generation.slots import Region, Slots
from lissom.inspect.report import Report
from lissom.io.files import check_path
from lissom.runtime.compiled_model import CompiledModel
from lissom.runtime.hosted_model import FixedModule

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase


class PooledDecoder(FixedModule):
    """A causal language model with a pool of KV-cache slots, which many texts share; made by `lissom.compile_pool`.

    Texts join and leave between calls: a call has the next token of every text that is being answered, and pieces of prompts. A
    prompt that begins as an earlier one reuses its keys and values. All methods may be called from several threads.

    Attributes:
        program: the optimized program.
        report: what every step did; prints as a table.
        backend: the name of the backend.
        sequences: the most texts in one call; more wait.
        max_length: the most tokens of a text, prompt and answer together.
        slots: the tokens that the pool holds.
        config: that of the model.
        generation_config: that of the model.

    Examples:
        >>> import torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     eos_token_id=None,
        ... )
        >>> decoder = lissom.compile_pool(LlamaForCausalLM(config), max_length=32, sequences=2)
        >>> len(list(decoder.stream([1, 2, 3], max_new_tokens=4)))
        4
    """

    def __init__(
        self,
        compiled: CompiledModel,
        config: PreTrainedConfig,
        generation_config: GenerationConfig,
        sizes: PoolSizes,
    ) -> None:
        super().__init__(compiled.program)
        self.compiled = compiled
        self.config, self.generation_config = config, generation_config
        self.max_length, self.sequences = sizes.max_length, sizes.sequences
        (self.slots,) = map(fixed, compiled.program.signature.tensors[3].type.shape)
        self.vocabulary = vocabulary_size(compiled.program)
        self._key_positions = torch.zeros(self.slots, dtype=torch.int64, device=self.device)
        self._batching = Batching(self)

    @property
    def report(self) -> Report:
        return self.compiled.report

    @property
    def backend(self) -> str:
        return self.compiled.backend

    def save(
        self,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: Saveable | None = None,
    ) -> None:
        """Write a directory that `lissom.load_pool` reads: the program, and the model's configuration as JSON.

        Arguments and errors as of `GenerationModel.save`.
        """
        sizes = PoolSizes(self.max_length, self.sequences)
        save(Parts(self.compiled, self.config, self.generation_config, pool=sizes), check_path(directory), tokenizer, processor)

    @classmethod
    def of(cls, parts: Parts) -> PooledDecoder:
        """The decoder of these parts."""
        assert parts.pool is not None
        return cls(parts.compiled, parts.config, parts.generation_config, parts.pool)

    @property
    def waiting(self) -> int:
        """Texts that wait for room."""
        return self._batching.waiting

    @property
    def running(self) -> int:
        """Texts that are read or answered."""
        return self._batching.running

    @property
    def reserved(self) -> int:
        """Slots of texts that are read or answered, without those of shared prompts."""
        return self._batching.reserved

    def generate(
        self, prompts: Sequence[torch.Tensor | Sequence[int]], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[torch.Tensor]:
        """The answers to prompts of any lengths, [tokens] each, without the prompts.

        Args:
            prompts: token ids, [tokens] or [1, tokens] each.
            max_new_tokens: of each answer.
            sampling: how tokens are chosen and which end the text; by default the likeliest, and those that end texts of the
                model.

        Raises:
            InputError: for a prompt without tokens, with ids out of range, or too long.
        """
        texts = [self.submit(prompt, max_new_tokens, sampling) for prompt in prompts]
        try:
            return [torch.tensor(list(self._batching.tokens(text)), dtype=torch.int64) for text in texts]
        finally:
            for text in texts:
                self._batching.cancel(text)

    def stream(
        self, prompt: torch.Tensor | Sequence[int], max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """The tokens that follow a prompt, one by one; closing the iterator ends the text.

        The text is computed together with those of other threads.

        Args:
            prompt: token ids, [tokens] or [1, tokens].
            max_new_tokens: of the answer.
            sampling: as of `generate`.

        Raises:
            InputError: as `generate`.
        """
        text = self.submit(prompt, max_new_tokens, sampling)

        def tokens() -> Iterator[int]:
            try:
                yield from self._batching.tokens(text)
            finally:
                self._batching.cancel(text)

        return tokens()

    def submit(self, prompt: torch.Tensor | Sequence[int], max_new_tokens: int, sampling: Sampling | None = None) -> Text:
        """Add a text, which `step` computes; for one thread that makes the calls for all. Arguments and errors as `generate`.

        The thread takes the tokens from `new` of the text; after `is_finished`, `error` is what ended it, or None.

        Examples:
            >>> import torch, lissom
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> config = LlamaConfig(
            ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            ...     eos_token_id=None,
            ... )
            >>> decoder = lissom.compile_pool(LlamaForCausalLM(config), max_length=32, sequences=2)
            >>> texts = [decoder.submit(prompt, max_new_tokens=4) for prompt in ([1, 2, 3], [4, 5])]
            >>> while decoder.step():
            ...     pass
            >>> [(len(text.new), text.is_finished) for text in texts]
            [(4, True), (4, True)]
        """
        return self._batching.submit(self._text(prompt, max_new_tokens, sampling))

    def step(self) -> bool:
        """Make one call for all texts; returns whether texts are left."""
        return self._batching.step()

    def cancel(self, text: Text) -> None:
        """End a text of `submit`; its slots are free before the next call."""
        self._batching.cancel(text)

    def _text(self, prompt: torch.Tensor | Sequence[int], max_new_tokens: int, sampling: Sampling | None) -> Text:
        """A checked text. Raises InputError."""
        ids = torch.as_tensor(prompt)
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or not ids.numel():
            raise InputError(f"a prompt is {ids.dtype} of {list(ids.shape)}; give whole numbers, [tokens], one or more")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocabulary:
            raise InputError(
                f"a prompt has token {low if low < 0 else high}, and the vocabulary ids 0 to {self.vocabulary - 1}; use the "
                f"model's tokenizer"
            )
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens!r:.80}; give 1 or more")
        if len(ids) + max_new_tokens > self.max_length:
            raise InputError(
                f"prompt and answer are to be {len(ids)} + {max_new_tokens} tokens, and a text has {self.max_length} at most; "
                f"lower max_new_tokens, or compile with a larger max_length"
            )
        sampling = sampling or Sampling.of(self.generation_config)
        return Text(ids.tolist(), max_new_tokens, sampling.choice(self.device), sampling)

    def read(self, parts: Sequence[tuple[Region, Sequence[int]]]) -> torch.Tensor:
        """Append tokens to sequences; returns the logits after the last token of each, [parts, vocabulary].

        The last tokens come last in the call, whose program returns their logits.
        """
        order = [(part, index) for part, (_, ids) in enumerate(parts) for index in range(len(ids) - 1)]
        order += [(part, len(ids) - 1) for part, (_, ids) in enumerate(parts)]
        first = [len(region.tokens) for region, _ in parts]
        slots = [region.slots(start, start + len(ids)) for start, (region, ids) in zip(first, parts, strict=True)]
        own = torch.stack([self._own(region, new) for (region, _), new in zip(parts, slots, strict=True)])
        places = torch.tensor([slots[part][index] for part, index in order])
        positions = torch.tensor([first[part] + index for part, index in order])
        tokens = torch.tensor([[parts[part][1][index] for part, index in order]])
        self._key_positions[places.to(self.device)] = positions.to(self.device)
        rows = own[torch.tensor([part for part, _ in order])]
        inputs = [tokens, positions[None], places, self._key_positions, rows]
        (logits,) = self.compiled.run([tensor.to(self.device) for tensor in inputs])
        assert isinstance(logits, torch.Tensor)
        for region, ids in parts:
            region.tokens.extend(ids)
        return logits[0, -len(parts) :]

    def _own(self, region: Region, new: Sequence[int]) -> torch.Tensor:
        """The slots of a sequence, [slots], with new ones."""
        if region.own is None:
            region.own = torch.zeros(self.slots, dtype=torch.bool)
            region.own[region.slots(0, len(region.tokens))] = True
        region.own[list(new)] = True
        return region.own

    def new_slots(self) -> Slots:
        """The slots of an empty pool."""
        return Slots(self.slots)

    def __repr__(self) -> str:
        return f"PooledDecoder({self.program.name}, {self.sequences} texts, {self.slots} slots, backend='{self.backend}')"
