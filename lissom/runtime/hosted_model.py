"""What libraries ask of a model they run: pipelines of transformers, Sentence Transformers, whatever takes an `nn.Module`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import nn

from lissom.artifacts.fields import take, take_list, text
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType
from lissom.errors import ArtifactError, CaptureError, InputError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SWITCHES = {"use_cache": "past_key_values", "output_attentions": "attentions", "output_hidden_states": "hidden_states"}
"""Arguments that ask a model of transformers for more outputs, and the output each asks for."""


@dataclass(frozen=True)
class Facts:
    """What a model of transformers says of itself, beside its weights.

    configuration: as JSON. main_input: the argument that tokens, pixels or sound are passed as. modalities: what it reads.
    config_class: of the configuration; None finds it by its model type.
    """

    configuration: Mapping[str, object]
    main_input: str
    modalities: tuple[str, ...]
    config_class: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Facts | None:
        """A model's facts; None when it has no configuration, being no model of transformers."""
        config: Any = getattr(model, "config", None)
        if not hasattr(config, "to_json_string"):
            return None
        modalities = getattr(model, "input_modalities", ())
        listed = (modalities,) if isinstance(modalities, str) else tuple(modalities)
        main_input = str(getattr(model, "main_input_name", "input_ids"))
        return cls(json.loads(config.to_json_string(use_diff=False)), main_input, listed, type(config))

    def to_json(self) -> dict[str, object]:
        return {"config": self.configuration, "main_input": self.main_input, "modalities": list(self.modalities)}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Facts | None:
        """The facts `to_json` gave, None for an empty mapping. Raises: ArtifactError when they are not as it writes them."""
        if not data:
            return None
        try:
            return cls(take(data, "config", dict), take(data, "main_input", str), take_list(data, "modalities", text))
        except ValueError as error:
            raise ArtifactError(
                f"what the artifact says of its model is nothing this Lissom can read: {error}; save the model again"
            ) from error

    def make_config(self) -> PretrainedConfig:
        """The configuration as transformers has it, a new one at every call.

        Raises: ImportError without transformers, ArtifactError when transformers refuses it.
        """
        from transformers import CONFIG_MAPPING, PretrainedConfig

        kind = str(self.configuration.get("model_type"))
        # Its classes are imported when they are looked up with brackets, and only then.
        known = CONFIG_MAPPING[kind] if kind in CONFIG_MAPPING else PretrainedConfig  # noqa: SIM401
        try:
            return (self.config_class or known).from_dict(dict(self.configuration))
        # Configurations have errors of their own for values they do not take.
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise ArtifactError(f"transformers refuses the configuration of this model of type '{kind}': {first}") from error


class FixedModule(nn.Module):
    """A program as a module: without parameters to train, and fixed to the device and dtype it was compiled for.

    Its weights are `program.weights()`; `parameters()` is empty, since nothing that changed them would reach what a backend
    built.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        # By it, modules this one is part of find out where it is, and `to` what it is asked for.
        self.register_buffer("_place", torch.empty(0, dtype=_dtype_of(program), device=_device_of(program)), persistent=False)
        super().train(False)

    @property
    def device(self) -> torch.device:
        """Where it runs, and takes its inputs."""
        return cast("torch.Tensor", self._buffers["_place"]).device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type it takes, or returns where all it takes is integers."""
        return cast("torch.Tensor", self._buffers["_place"]).dtype

    def train(self, mode: bool = True) -> Self:
        """Itself, when asked to evaluate, which is all it does.

        Raises: UnsupportedError when asked to train.
        """
        if mode:
            raise UnsupportedError(
                f"{self.program.name} is compiled for inference and cannot train; train the model it was compiled from, "
                f"and compile that again"
            )
        return self

    def _take_name(self) -> None:
        """Call its class what the model's was called: by that, pipelines tell whether a model is for their task."""
        kind = type(self)
        named: Any = type(self.program.name, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})
        self.__class__ = named

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What `to`, `cuda`, `half` and the like do, here and in modules around this one: nothing, or they are refused.

        Raises: UnsupportedError for another device or dtype.
        """
        place = cast("torch.Tensor", self._buffers["_place"])
        moved = fn(place)
        if moved.device != place.device:
            raise UnsupportedError(
                f"{self.program.name} was compiled for {place.device} and cannot move to {moved.device}; compile it with "
                f"device='{moved.device}', or keep what runs it on {place.device} (for a pipeline: device='{place.device}')"
            )
        if moved.dtype != place.dtype:
            raise UnsupportedError(
                f"{self.program.name} is compiled and cannot be turned into {moved.dtype}; turn the model it was compiled from "
                f"and compile that"
            )
        return self


class HostedModel(FixedModule):
    """A program as a module that says of itself what the model did.

    facts: where the model was one of transformers, its `config`, `main_input_name` and `input_modalities` are this one's too,
    and its class has the same name.
    """

    def __init__(self, program: Program, facts: Facts | None) -> None:
        super().__init__(program)
        self.facts = facts
        self._returned = _names_returned(program)
        if facts is not None:
            self.main_input_name = facts.main_input
            # One is written without a tuple, as in transformers.
            self.input_modalities = facts.modalities[0] if len(facts.modalities) == 1 else facts.modalities
            self._take_name()

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, a copy. Raises: AttributeError where it had none, or transformers is not installed."""
        try:
            if self.facts is not None:
                return self.facts.make_config()
        except ImportError as error:
            raise AttributeError("config") from error
        raise AttributeError("config")

    def can_generate(self) -> bool:
        """False: it answers one call, and keeps nothing for the next token."""
        return False

    def asked(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """The arguments without those that only ask a model of transformers to return what this one returns anyway.

        Raises: InputError when they ask for something else.
        """
        if self.facts is None:
            return arguments
        captured = {item.name for item in (*self.program.signature.positional, *self.program.signature.keyword)}
        kept = dict(arguments)
        for name in {"return_dict", *_SWITCHES} & arguments.keys() - captured:
            value = kept.pop(name)
            given = bool(self._returned) if name == "return_dict" else _returns(self._returned, _SWITCHES[name])
            if value is not None and bool(value) != given:
                raise InputError(
                    f"argument '{name}' is {value!r}, and the program was captured with {given}: pass {given}, "
                    f"or compile again with {name}={value!r} among the example inputs"
                )
        return kept


def check_uncompiled(model: nn.Module) -> None:
    """Refuse a model that is compiled. Raises: CaptureError."""
    if isinstance(model, FixedModule):
        raise CaptureError(f"{model.program.name} is compiled already; compile the model it was made from")


def _device_of(program: Program) -> torch.device:
    return next((leaf.type.device for leaf in program.signature.tensors), torch.device("cpu"))


def _dtype_of(program: Program) -> torch.dtype:
    taken = [leaf.type for leaf in program.signature.tensors]
    returned = [nodes.node_type(node) for node in program.output.all_input_nodes]
    dtypes = (found.dtype for found in (*taken, *returned) if isinstance(found, TensorType))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _names_returned(program: Program) -> tuple[str, ...]:
    """The names of what the program returns, where it returns a mapping."""
    signature = program.signature
    # Values that no output class takes for a field that was left out, or for fields in one.
    found = signature.unflatten([torch.empty(())] * signature.out_spec.num_leaves)
    return tuple(map(str, found)) if isinstance(found, Mapping) else ()


def _returns(names: tuple[str, ...], wanted: str) -> bool:
    """Whether one is the output wanted, be it of an encoder or a decoder."""
    return any(name.endswith(wanted) for name in names)
