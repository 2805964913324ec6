"""A compiled decoder with the model's configurations and its draft, without importing transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lissom.compiler.ir.program import Program
from lissom.errors import InputError, UnsupportedError
from lissom.generation.decoder import Decoder, vocabulary_size
from lissom.generation.proposers import PROMPT_LOOKUP, DraftDecoder, PromptLookup, Proposer
from lissom.generation.speculate import Drafts, Speculator
from lissom.runtime.compiled_model import CompiledModel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig


class ConfiguredDecoder(Decoder):
    """A compiled decoder with the model's configurations, without `generate` of transformers, which takes a second to import.

    Attributes:
        config: that of the model.
        generation_config: that of the model.
        speculator: generates with a draft; None without one.
    """

    config: PreTrainedConfig
    generation_config: GenerationConfig
    speculator: Speculator | None

    def __init__(self, compiled: CompiledModel, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(compiled)
        self.config = config
        self.generation_config = generation_config
        self.speculator = None

    @property
    def drafts(self) -> Drafts | None:
        """Draft tokens of the last text: proposed, accepted, and tokens per call. None for a decoder without a draft."""
        return None if self.speculator is None else self.speculator.drafts

    def use_draft(self, draft: str | Decoder) -> None:
        """Generate with a draft from now on.

        Args:
            draft: `prompt-lookup`, or a smaller decoder for the same tokens.

        Raises:
            InputError: for a draft that does not fit.
            UnsupportedError: for a decoder whose calls cannot verify one.
        """
        check_verifies(self)
        if isinstance(draft, Decoder):
            _check_fits(self, draft)
        elif draft != PROMPT_LOOKUP:
            raise InputError(
                f"draft={draft!r:.80} is no draft for a compiled decoder; give '{PROMPT_LOOKUP}' or a decoder, or name "
                f"passes where the model is compiled"
            )
        proposer: Proposer = DraftDecoder(draft) if isinstance(draft, Decoder) else PromptLookup()
        self.speculator = Speculator(self, proposer)

    @property
    def saved_draft(self) -> CompiledModel | str | None:
        """The draft as a directory holds it: a program, or the name of a proposer."""
        if self.speculator is None:
            return None
        proposer = self.speculator.proposer
        return proposer.decoder.compiled if isinstance(proposer, DraftDecoder) else PROMPT_LOOKUP

    def use_saved_draft(self, draft: CompiledModel | str | None) -> None:
        """The inverse of `saved_draft`. Raises as `use_draft`."""
        if draft is not None:
            self.use_draft(draft if isinstance(draft, str) else Decoder(draft))


def check_verifies(decoder: ConfiguredDecoder) -> None:
    """Refuse a decoder that cannot verify drafts. Raises UnsupportedError."""
    name = decoder.program.name
    if decoder.config.is_encoder_decoder:
        raise UnsupportedError(f"draft= takes a causal language model, and {name} is an encoder-decoder; leave draft= out")
    if decoder.batch != 1:
        raise UnsupportedError(f"draft= takes one sequence, and {name} is compiled for {decoder.batch}; compile with batch=1")
    if decoder.compiled.ranks is not None:
        raise UnsupportedError(f"draft= takes a decoder in one process, and {name} runs on several ranks; leave draft= out")
    if not decoder.is_croppable:
        raise UnsupportedError(
            f"draft= removes rejected tokens from the cache, and the recurrent state of {name} cannot be cropped; leave "
            f"draft= out"
        )
    if decoder.last_logits == 1:
        raise UnsupportedError(
            f"{name} returns the logits of one token per call, and verifying a draft takes several; compile it with draft= or "
            f"all_logits=True"
        )


def _check_fits(decoder: Decoder, draft: Decoder) -> None:
    """Refuse a draft for other tokens, or without room for the text. Raises InputError, UnsupportedError."""
    name = draft.program.name
    if draft is decoder:
        raise InputError("the draft is the decoder itself; give a smaller one")
    sizes = vocabulary_size(draft.program), vocabulary_size(decoder.program)
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft {name} has a vocabulary of {sizes[0]} tokens, and the decoder one of {sizes[1]}; give a draft with the "
            f"same tokenizer"
        )
    if not _same_ids(draft.program, decoder.program):
        raise InputError(
            f"prune-vocabulary kept other tokens in the draft {name} than in the decoder; give both the same pass and data"
        )
    if draft.batch != 1:
        raise InputError(f"the draft {name} reads {draft.batch} sequences at once; compile it with batch=1")
    if draft.max_length < decoder.max_length:
        raise InputError(
            f"the draft's cache holds {draft.max_length} tokens, and the decoder's {decoder.max_length}; compile the draft "
            f"with max_length={decoder.max_length}"
        )
    if not draft.is_croppable or draft.compiled.ranks is not None:
        raise UnsupportedError(
            f"rejected tokens are removed from the draft's cache, and the recurrent state of {name} cannot be cropped; give a "
            f"draft with a KV cache alone"
            if not draft.is_croppable
            else f"the draft {name} runs on several ranks; compile it for one process"
        )
    bytes_read, most = (each.get_memory_footprint(return_buffers=False) for each in (draft, decoder))
    if bytes_read > most:
        raise InputError(
            f"the draft's weights take {bytes_read / 1e6:.3g} MB, and the decoder's {most / 1e6:.3g} MB; give a smaller draft"
        )


def _same_ids(draft: Program, program: Program) -> bool:
    """True if both programs read the same token ids, none dropped in one of them alone."""
    one, other = draft.vocabulary, program.vocabulary
    if one is None or other is None:
        return one is other
    return (one.ids, one.logits) == (other.ids, other.logits) and torch.equal(one.kept, other.kept)
