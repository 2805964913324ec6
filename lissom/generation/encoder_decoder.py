"""A compiled encoder-decoder with transformers' `generate`: the encoder runs once for a text, the decoder for every token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from lissom.errors import InputError, UnsupportedError
from lissom.frontends.generation.encoder_decoder import CROSS, HIDDEN, MASK, decoder_inputs, widened
from lissom.generation.directory import Parts
from lissom.generation.model import GenerationModel
from lissom.inspect.report import Report
from lissom.runtime.compiled_model import CompiledModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ATTENTION_MASK = "attention_mask"
_OTHER_OUTPUTS = ("output_attentions", "output_hidden_states")
_SWITCHES = ("return_dict", "use_cache")
_MODALITIES = {"input_ids": "text", "pixel_values": "image", "flattened_patches": "image"}
_WHISPER = "WhisperGenerationMixin"


class Encoder(nn.Module):
    """The encoder of a compiled encoder-decoder.

    Attributes:
        compiled: its program.
        main_input_name: the argument for tokens or audio. Its output holds, besides `last_hidden_state`, the keys and values of
            the decoder's cross-attention.
    """

    def __init__(self, compiled: CompiledModel) -> None:
        super().__init__()
        self.compiled = compiled
        self.names = [argument.name for argument in compiled.program.signature.keyword]
        self.main_input_name = self.names[0]

        def forward(**inputs: object) -> BaseModelOutput:
            return self.read(inputs)

        # `generate` passes the arguments that are in the signature.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in self.names])
        self.forward = forward

    @property
    def report(self) -> Report:
        return self.compiled.report

    def read(self, inputs: Mapping[str, object]) -> BaseModelOutput:
        """The encoder's output for its inputs; without an attention mask nothing is padding.

        Raises:
            InputError: for other inputs than those of the program.
            UnsupportedError: for outputs that it does not have.
        """
        given = {name: value for name, value in inputs.items() if value is not None and value is not False}
        given = {
            name: widened(value) if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
            if name not in _SWITCHES
        }
        asked = next((name for name in _OTHER_OUTPUTS if name in given and name not in self.names), None)
        if asked is not None:
            raise UnsupportedError(
                f"a compiled encoder-decoder returns no attention weights and hidden states; leave out {asked}=, and "
                f"timestamps of words, which need it"
            )
        main = given.get(self.main_input_name)
        if not isinstance(main, torch.Tensor):
            raise InputError(f"{self.main_input_name} is a {type(main).__name__}; give a tensor, which the encoder reads")
        if ATTENTION_MASK in self.names and ATTENTION_MASK not in given:
            given[ATTENTION_MASK] = main.new_ones(main.shape[:2], dtype=torch.int64)
        outputs: dict[str, torch.Tensor] = self.compiled(**given)
        output = BaseModelOutput(last_hidden_state=outputs[HIDDEN])
        for name, tensor in outputs.items():
            output[name] = tensor
        return output


class EncoderDecoderModel(GenerationModel):
    """A compiled encoder-decoder with the `generate` method of the original model.

    Attributes:
        encoder: the compiled encoder. The other attributes are those of `GenerationModel`: its KV cache holds the decoder's
            tokens.

    Examples:
        >>> import torch, lissom
        >>> from transformers import T5Config, T5ForConditionalGeneration
        >>> sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        >>> config = T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)
        >>> model = lissom.compile_generation(T5ForConditionalGeneration(config), max_length=16)
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None).shape
        torch.Size([1, 5])
        >>> model.encode(input_ids=torch.tensor([[5, 6, 7]]))
        >>> model.step(torch.tensor([[0]])).shape
        torch.Size([1, 50])
    """

    base_model_prefix: ClassVar[str] = ""

    def __init__(
        self, compiled: CompiledModel, encoder: CompiledModel, config: PreTrainedConfig, generation_config: GenerationConfig
    ) -> None:
        super().__init__(compiled, config, generation_config)
        self.encoder = Encoder(encoder)
        self.main_input_name = self.encoder.main_input_name
        self.input_modalities = _MODALITIES.get(self.main_input_name, "audio")
        self._read_from: object = None
        if _WHISPER in (parent.__name__ for parent in type(self).__mro__):
            # Its `generate` reads the strides of the encoder's convolutions, which are these in every configuration.
            strides = SimpleNamespace(conv1=SimpleNamespace(stride=(1,)), conv2=SimpleNamespace(stride=(2,)))
            self.model = SimpleNamespace(encoder=strides, config=config)

    def get_encoder(self) -> Encoder:
        return self.encoder

    @property
    def _parts(self) -> Parts:
        return Parts(self.compiled, self.config, self.generation_config, self.encoder.compiled)

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """The model of these parts, an encoder among them."""
        assert parts.encoder is not None
        return cls(parts.compiled, parts.encoder, parts.config, parts.generation_config)

    @property
    def _kind(self) -> type[GenerationModel]:
        return EncoderDecoderModel

    def encode(self, **inputs: object) -> None:
        """Run the encoder on a text or a sound, and empty the KV cache; `step` then takes the decoder's tokens.

        Args:
            inputs: those of the model's encoder, by name; of `batch` rows, or of a divisor of it, whose rows are then repeated.

        Raises:
            InputError: if they do not fit.
        """
        self._encode(inputs)
        self.reset()

    def _encode(self, inputs: Mapping[str, object]) -> None:
        """`encode` without emptying the cache."""
        source = self.encoder.read(inputs)
        rows = source[HIDDEN].shape[0]
        copies, rest = divmod(self.batch, rows)
        if rest or not copies:
            raise InputError(
                f"the encoder read {rows} rows, and this decoder generates {self.batch}; compile with batch={rows}"
            )
        for name, tensor in source.items():
            source[name] = tensor.repeat_interleave(copies, 0) if copies > 1 else tensor
        self._copies = copies
        self._take(source)

    def prefill(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encode a text, [batch, tokens]; returns the logits after the start token, as `step`.

        Raises:
            InputError: as `step`.
        """
        self.encode(**{self.encoder.main_input_name: input_ids})
        start = self.generation_config.decoder_start_token_id
        start = self.generation_config.bos_token_id if start is None else start
        if not isinstance(start, int):
            raise InputError("the configuration has no decoder_start_token_id; call encode, and step with the first tokens")
        return self.step(torch.full((self.batch, 1), start, dtype=torch.int64, device=self.device))

    def slots(self, input_ids: torch.Tensor) -> int:
        """The start token alone: the encoder reads the prompt."""
        return 1

    def reorder(self, rows: torch.Tensor) -> None:
        """As `Decoder.reorder`; the keys and values of cross-attention follow."""
        super().reorder(rows)
        own = torch.arange(self.batch, device=rows.device)
        if not torch.equal(rows // self._copies, own // self._copies):  # else the rows read the same text
            self._source = [tensor[rows.to(tensor.device)] for tensor in self._source]
            self._copies = 1

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        decoder_input_ids: torch.Tensor,
        encoder_outputs: Mapping[str, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **others: object,
    ) -> Seq2SeqLMOutput:
        """The forward of transformers: logits [batch, 1, vocabulary] of the last token, with all_logits of all tokens.

        Args:
            encoder_outputs: what `encoder` returned; without it the encoder runs on its inputs, given by name. Others as for
                `GenerationModel.forward`.

        Raises:
            InputError: as `step`.
            UnsupportedError: for inputs and outputs that a compiled decoder does not have.
        """
        inputs = {name: others.pop(name) for name in self.encoder.names if name in others}
        if encoder_outputs is None:
            self._encode({**inputs, **({ATTENTION_MASK: attention_mask} if ATTENTION_MASK in self.encoder.names else {})})
        elif encoder_outputs is not self._read_from:
            self._take(encoder_outputs)
        outputs = super().forward(
            decoder_input_ids, decoder_attention_mask, cache, use_cache, logits_to_keep, return_dict, **others
        )
        return Seq2SeqLMOutput(logits=outputs.logits, cache=self.cache if use_cache else None)  # pyright: ignore

    def prepare_inputs_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, cache: Cache | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The new tokens of the decoder; the output of the encoder goes along."""
        prepared = super().prepare_inputs_for_generation(input_ids, next_sequence_length, cache, **kwargs)
        return {"decoder_input_ids": prepared.pop("input_ids"), **prepared}

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        return sum(part.num_parameters(only_trainable, exclude_embeddings) for part in (super(), self.encoder.compiled))

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        return sum(part.get_memory_footprint(return_buffers) for part in (super(), self.encoder.compiled))

    def _check(self, input_ids: torch.Tensor) -> int:
        if not self._source:
            raise InputError("the decoder has no text to read from; call encode(...) before step(...)")
        return super()._check(input_ids)

    def _take(self, outputs: Mapping[str, torch.Tensor]) -> None:
        """Use an output of the encoder for cross-attention. Raises InputError for one of another encoder, or other rows."""
        if not isinstance(outputs, Mapping) or f"{CROSS}_keys_0" not in outputs:
            raise InputError(
                f"encoder_outputs= is a {type(outputs).__name__} without the keys and values of cross-attention; pass what "
                f"encoder(...) of this model returns, or the inputs of the encoder"
            )
        rows = outputs[MASK].shape[0]
        if rows != self.batch:
            raise InputError(
                f"encoder_outputs= has {rows} rows, and this decoder generates {self.batch}; compile it with batch={rows}"
            )
        self._source = tree_leaves(decoder_inputs(outputs))
        own = torch.arange(self.batch, device=self.device)
        first = own - own % self._copies
        # The mask and the keys of the first layer tell whether rows are copies of one text, as beams are.
        if not all(torch.equal(tensor, tensor[first]) for tensor in self._source[:2]):
            self._copies = 1
        self._read_from = outputs

    def _take_name(self) -> None:
        """As for every compiled model; `generate` is the model's own where transformers keeps it in a class of its own."""
        known = {*MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()}
        original = getattr(transformers, self.program.name) if self.program.name in known else None
        kinds = original.__mro__ if isinstance(original, type) else ()
        own = [kind for kind in kinds if issubclass(kind, GenerationMixin) and not issubclass(kind, PreTrainedModel)]
        own = [kind for kind in own if kind is not GenerationMixin]
        kind = type(self)
        fields = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        named: Any = type(self.program.name, (kind, *own), fields)
        self.__class__ = named


def refuse_own_generate(model: PreTrainedModel) -> None:
    """Refuse a model whose class has a `generate` of its own, which may do more than tokens. Raises UnsupportedError."""
    if "generate" in vars(type(model)):
        raise UnsupportedError(
            f"{type(model).__name__} has a generate of its own, which a compiled model lacks; compile its parts with "
            f"lissom.compile"
        )
