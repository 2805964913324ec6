"""A compiled decoder with transformers' `generate`: sampling, beams, streamers, stopping criteria, logits processors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import Cache, GenerationConfig
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from lissom.artifacts.artifact import Trust
from lissom.artifacts.model_files import Saveable, upload
from lissom.backends.base import Backend
from lissom.errors import InputError, UnsupportedError
from lissom.generation.assisted import generate_with_draft
from lissom.generation.configured import ConfiguredDecoder
from lissom.generation.decoder import Decoder
from lissom.generation.directory import Parts, save
from lissom.generation.saved import read
from lissom.io.files import check_path
from lissom.runtime.compiled_model import CompiledModel
from lissom.runtime.generating import CompiledGeneration
from lissom.runtime.pickled import files_of, loaded_from

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedConfig, PreTrainedTokenizerBase, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

_OF_GENERATE = ("is_first_iteration", "labels", "tokenizer", "assistant_tokenizer")
"""Arguments of `generate` that it also gives to the forward."""


class GenerationModel(ConfiguredDecoder, CompiledGeneration):
    """A compiled decoder with the `generate` method of the original model.

    `generate` starts with an empty cache unless it is given this one. Its class has the name of the model's class, and a
    transformers pipeline takes it in place of the model.

    Attributes:
        config: that of the model.
        generation_config: that of the model.
        cache: the KV cache as `generate` sees it; `generate(cache=decoder.cache)` continues the cached text.

    Examples:
        >>> import torch, lissom
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> decoder = lissom.compile_generation(LlamaForCausalLM(config), max_length=32)
        >>> answer = decoder.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
        >>> decoder.generate(answer, cache=decoder.cache, max_new_tokens=2, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 9])
    """

    input_modalities: str = "text"

    def __init__(self, compiled: CompiledModel, config: PreTrainedConfig, generation_config: GenerationConfig) -> None:
        super().__init__(compiled, config, generation_config)
        self.cache = DecoderCache(self)
        self._copies = 1  # how many rows one after the other are of the same text
        self._take_name()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **others: object,
    ) -> CausalLMOutputWithPast:
        """The forward of transformers: logits [batch, 1, vocabulary] of the last token, with all_logits of all tokens.

        Args:
            attention_mask: [batch, cached and new tokens], 0 for padding.
            cache: this decoder's own, to append to it; without it, the KV cache is emptied first.

        Raises:
            InputError: as `step`.
            UnsupportedError: for inputs and outputs that a compiled decoder does not have.
        """
        wanted = [name for name, value in others.items() if value is not None and value is not False]
        if wanted:
            raise UnsupportedError(f"a compiled decoder gives logits for token ids and nothing else; leave out {wanted[0]}=")
        if cache is None:
            self.reset()
        self._refuse_other(cache)
        if logits_to_keep > self.last_logits:
            given = "the last" if self.last_logits == 1 else f"the last {self.last_logits}"
            raise UnsupportedError(
                f"logits of {logits_to_keep} tokens were asked for, and this decoder gives those of {given}; "
                f"compile it with all_logits=True"
            )
        logits = self._read(input_ids, attention_mask)
        if logits_to_keep or not self.all_logits:
            logits = logits[:, -max(1, logits_to_keep) :]
        return CausalLMOutputWithPast(logits=logits, cache=self.cache if use_cache else None)

    def save(
        self,
        directory: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: Saveable | None = None,
    ) -> None:
        """Write a directory that `lissom.load_generation` reads: the program, and the model's configuration as JSON.

        It is written completely or not at all; an existing decoder is replaced.

        Args:
            tokenizer: saved in the same directory.
            processor: likewise; it may also be a feature extractor.

        Raises:
            ArtifactError: if the directory cannot be written.
            UnsupportedError: if the backend cannot be saved.
        """
        save(self._parts, check_path(directory), tokenizer, processor)

    @property
    def _parts(self) -> Parts:
        """The parts that are saved."""
        return Parts(self.compiled, self.config, self.generation_config, draft=self.saved_draft)

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """The model of these parts."""
        model = cls(parts.compiled, parts.config, parts.generation_config)
        model.use_saved_draft(parts.draft)
        return model

    @property
    def _kind(self) -> type[GenerationModel]:
        """The class that a pickle names; the model's own class is made for it alone."""
        return GenerationModel

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload a model compiled by Lissom",
    ) -> str:
        """Upload the directory that `save` writes to a repository of the Hugging Face Hub; returns its address.

        Raises:
            ArtifactError: if the Hub cannot be reached, or refuses the upload.
            LissomError: as `save`.
        """
        return upload(partial(self.save, tokenizer=tokenizer), self.program.name, repo_id, private, token, commit_message)

    def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
        """Pickle and deep copy: the files of its artifact, the function that loads them, and a backend of another package.

        The cache is empty then.

        Raises:
            UnsupportedError: for a decoder that runs with other ranks, or whose backend cannot be saved.
        """
        self.compiled.check_alone()
        source = str(self.config._name_or_path)
        return _from_files, (self._kind, files_of(self.save), source, self.compiled.external_backend)

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> dict[str, Any]:
        """The new tokens, and the mask of all tokens, from which the program computes positions."""
        ids = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        forwarded = {key: value for key, value in kwargs.items() if key not in _OF_GENERATE}
        return {"input_ids": ids, "cache": cache, "attention_mask": attention_mask, **forwarded}

    def _sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """As in transformers; with a draft, unless the text is drafted for another model or generated without a cache."""
        mixin: Any = super()
        speculator, given = self.speculator, (input_ids, logits_processor, stopping_criteria, generation_config)
        own: Any = self
        if speculator is None or synced_gpus or not model_kwargs["use_cache"] or generation_config.is_assistant:
            return mixin._sample(*given, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        output = own._prefill(input_ids, generation_config, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        seen = input_ids[0] if mask is None else input_ids[0][mask[0, -input_ids.shape[1] :] != 0]
        answer = generate_with_draft(speculator, input_ids, output.logits[:, -1], seen.tolist(), *given[1:], streamer)
        if not isinstance(answer, torch.Tensor):
            answer.cache = self.cache
        return answer

    def _refuse_other(self, cache: object) -> None:
        if cache is not None and cache is not self.cache:
            raise InputError(f"cache= is a {type(cache).__name__} from elsewhere; a compiled decoder has its own, .cache")

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: object,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` this decoder's cache, emptied unless the caller passed it. Raises InputError."""
        beams = generation_config.num_beams or 1
        if beams > 1 and self.speculator is not None:
            raise UnsupportedError(
                f"a decoder with a draft generates greedy and sampled text, and num_beams is {beams}; compile it without draft="
            )
        copies = max(beams, generation_config.num_return_sequences or 1)
        if batch_size * copies != self.batch:
            several = f" with {copies} beams or samples each" if copies > 1 else ""
            raise InputError(
                f"generate was given {batch_size} sequences{several}, and this decoder was compiled for {self.batch} at once; "
                f"compile it with batch={batch_size * copies}"
            )
        if max_cache_length > self.max_length:
            raise InputError(
                f"prompt and answer are to be {max_cache_length + 1} tokens, and the cache holds {self.max_length}; "
                f"lower max_new_tokens, or compile with max_length={max_cache_length + 1}"
            )
        given = model_kwargs.get("cache")
        self._refuse_other(given)
        self._copies = copies
        if given is None and generation_config.use_cache is not False:
            self.reset()
            model_kwargs["cache"] = self.cache
        elif given is not None:
            given._is_user_defined = True


def _from_files(
    kind: type[GenerationModel], files: Mapping[str, bytes], source: str, backend: Backend | None = None
) -> GenerationModel:
    model = loaded_from(files, lambda folder: kind.of(read(folder, None, backend, Trust())))
    model.config._name_or_path = source
    return model


class DecoderCache(Cache):
    """The KV cache of a compiled decoder with transformers' interface: length, reordering, cropping."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(layers=[_Layer(decoder)])


class _Layer(CacheLayerMixin):
    """All layers of a decoder's KV cache; the program owns the tensors."""

    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self._decoder = decoder
        self.batch_size = decoder.batch
        self.is_initialized = True

    @property
    def is_croppable(self) -> bool:
        return self._decoder.is_croppable

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Does nothing: the program has its state."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> Any:
        raise UnsupportedError("the cache of a compiled decoder is filled by the decoder alone; call the decoder")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._decoder.max_length, 0

    def get_seq_length(self) -> int:
        return self._decoder.length

    def get_max_length(self) -> int:
        return self._decoder.max_length

    def reset(self) -> None:
        self._decoder.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; transformers passes their number as a negative one."""
        self._decoder.crop(self._decoder.length - abs(tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._decoder.reorder(beam_idx)

    def offload(self) -> None:
        """Does nothing: the state stays on the program's device."""

    def prefetch(self) -> None:
        """Does nothing: the state was never offloaded."""
