"""Compiled programs as modules for other libraries: transformers pipelines, Sentence Transformers, any `nn.Module` user."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from lissom.artifacts.facts import Facts
from lissom.compiler.analysis.embedding_bounds import embedding_tables
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import TensorType
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.threads import release_threads

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SWITCHES = {
    "use_cache": ("cache", "past_key_values"),
    "output_attentions": ("attentions",),
    "output_hidden_states": ("hidden_states",),
}
"""Arguments that request additional outputs from a transformers model, each with the names that the output may have."""


class FixedModule(nn.Module):
    """A program as a module without trainable parameters, fixed to the device and dtype it was compiled for.

    Its weights are in `state_dict()`; `parameters()` is empty, because changes to them would not reach the executable.
    """

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        # Its device and dtype tell parent modules where this one is, and show `_apply` what `to` requests.
        self.register_buffer("_place", torch.empty(0, dtype=_dtype_of(program), device=_device_of(program)), persistent=False)
        super().train(False)
        release_threads()  # those that compiled it: another thread may call it

    @property
    def device(self) -> torch.device:
        """The device it runs on and takes its inputs on."""
        return self._empty().device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point dtype of its inputs, or of its outputs if all inputs are integers."""
        return self._empty().dtype

    def _empty(self) -> torch.Tensor:
        """The buffer with its device and dtype."""
        place = self._buffers["_place"]
        assert place is not None
        return place

    def train(self, mode: bool = True) -> Self:
        """Returns the module itself for mode=False.

        Raises:
            UnsupportedError: for mode=True.
        """
        if mode:
            raise UnsupportedError(
                f"{self.program.name} is compiled for inference and cannot train; train the model it was compiled from, "
                f"and compile that again"
            )
        return self

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of elements of its weights, as packed for the backend.

        Args:
            only_trainable: 0, because a compiled model has none.
            exclude_embeddings: without the tables of embeddings.
        """
        if only_trainable:
            return 0
        tables = embedding_tables(self.program) if exclude_embeddings else {}
        return self.program.parameter_count - sum(tensor.numel() for tensor in tables.values())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """The bytes of its weights.

        Args:
            return_buffers: with those of its state, such as a KV cache.
        """
        state = 0 if return_buffers else sum(self.program.weight(name).nbytes for name in self.program.state)
        return self.program.parameter_bytes - state

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        """The weights of the program under their names in it. Called by `state_dict`, of this module or its parents."""
        for name, weight in self.program.weights().items():
            destination[prefix + name] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, object], prefix: str, *_: object, **__: object) -> None:
        """Called by `load_state_dict`, of this module or its parents.

        Raises:
            UnsupportedError: for other weights than its own.
        """
        own = {prefix + name: weight for name, weight in self.program.weights().items()}
        given = {name: value for name, value in state_dict.items() if name.startswith(prefix) or name in own}
        same = given.keys() == own.keys() and all(
            isinstance(value, torch.Tensor) and value.shape == own[name].shape and torch.equal(value, own[name])
            for name, value in given.items()
        )
        if not same:
            raise UnsupportedError(
                f"{self.program.name} is compiled, and its weights cannot be exchanged; load them into the model it was "
                f"compiled from, and compile that again"
            )

    def _take_name(self) -> None:
        """Give its class the name of the model's class: pipelines use it to tell whether a model fits their task."""
        kind = type(self)
        named: Any = type(self.program.name, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})
        self.__class__ = named

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Called by `to`, `cuda`, `half` and the like, of this module or its parents; changes nothing.

        Raises:
            UnsupportedError: for another device or dtype.
        """
        place = self._empty()
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
    """A program as a module with the metadata of the original model.

    Attributes:
        facts: of a transformers model; its `config`, `main_input_name`, `input_modalities` and class name are kept.
    """

    def __init__(self, program: Program, facts: Facts | None) -> None:
        super().__init__(program)
        self.facts = facts
        self._returned = _names_returned(program)
        if facts is not None:
            self.main_input_name = facts.main_input
            # A single modality is written without a tuple, as in transformers.
            self.input_modalities = facts.modalities[0] if len(facts.modalities) == 1 else facts.modalities
            self._take_name()
            self._name_arguments()

    def _name_arguments(self) -> None:
        """Give the forward of its class the arguments of the program: Trainer and pipelines read them from its signature."""
        kind = type(self)
        called = kind.forward

        @wraps(called)
        def forward(self: HostedModel, *args: object, **kwargs: object) -> object:
            return called(self, *args, **kwargs)

        signature = self.program.signature
        names = dict.fromkeys(["self", *(argument.name for argument in (*signature.positional, *signature.keyword))])
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names if name.isidentifier()]
        forward.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        kind.forward = forward

    @cached_property
    def config(self) -> PretrainedConfig:
        """A copy of the model's configuration. Raises AttributeError if it had none, or transformers is not installed."""
        try:
            if self.facts is not None:
                return self.facts.make_config()
        except ImportError as error:
            raise AttributeError("config") from error
        raise AttributeError("config")

    def can_generate(self) -> bool:
        """False: it keeps no KV cache between calls."""
        return False

    def asked(self, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """The arguments without those that request outputs which the program returns anyway.

        Raises:
            InputError: if they request anything else.
        """
        if self.facts is None:
            return arguments
        captured = {argument.name for argument in (*self.program.signature.positional, *self.program.signature.keyword)}
        kept = dict(arguments)
        for name in {"return_dict", *_SWITCHES} & arguments.keys() - captured:
            value = kept.pop(name)
            given = bool(self._returned) if name == "return_dict" else _returns(self._returned, _SWITCHES[name])
            if value is not None and bool(value) != given:
                advice = f"compile again with {name}={value!r} among the example inputs"
                if name == "use_cache" and value:
                    advice = "for generation compile with lissom.compile_generation"
                raise InputError(
                    f"argument '{name}' is {value!r}, and the program was captured with {given}: pass {given}, or {advice}"
                )
        return kept


def check_uncompiled(model: nn.Module) -> None:
    """Refuse a compiled model. Raises CaptureError."""
    if isinstance(model, FixedModule):
        raise CaptureError(f"{model.program.name} is compiled already; compile the model it was made from")


def _device_of(program: Program) -> torch.device:
    return next((leaf.type.device for leaf in program.signature.tensors), torch.device("cpu"))


def _dtype_of(program: Program) -> torch.dtype:
    argument_types = [leaf.type for leaf in program.signature.tensors]
    returned = [nodes.node_type(node) for node in program.output.all_input_nodes]
    dtypes = (value_type.dtype for value_type in (*argument_types, *returned) if isinstance(value_type, TensorType))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _names_returned(program: Program) -> tuple[str, ...]:
    """The names of the program's outputs if it returns a mapping, else none."""
    signature = program.signature
    # Tensors, because output classes take None for a missing field, and a tuple for several fields.
    outputs = signature.unflatten([torch.empty(())] * signature.out_spec.num_leaves)
    return tuple(map(str, outputs)) if isinstance(outputs, Mapping) else ()


def _returns(names: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """True if one of the names is the wanted output, of an encoder or a decoder."""
    return any(name.endswith(wanted) for name in names)
