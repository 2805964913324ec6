"""A backend of `transformers.exporters`: exports are compiled by Lissom, saved without pickle, and run by `ExportedModel`.

transformers captures the model, with its own patches and caches; the captured graph then takes the way of every other program:
passes with checks, lowering, an artifact. Importing this file registers the backend under the format `lissom`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn import functional
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer
from transformers.exporters.auto import register_backend
from transformers.exporters.configs import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter, patch_model_config
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.base import ModelRunner
from transformers.exporters.utils import _OUTPUT_FLAGS, apply_patches

from lissom.artifacts.packed import load_packed, pack
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.driver.compile import compile_captured
from lissom.driver.options import Settings, check_settings
from lissom.errors import CaptureError, InputError
from lissom.frontends.capture.cache_lengths import CacheLengths, tie_lengths
from lissom.frontends.capture.confirm import confirm
from lissom.frontends.capture.device import device_of
from lissom.frontends.capture.dynamic import describe_dimensions
from lissom.frontends.capture.export import Capture, evaluating
from lissom.frontends.capture.failures import describe_failure
from lissom.frontends.capture.flatten import flatten_exported
from lissom.runtime.compiled_model import CompiledModel, load

FORMAT = "lissom"
MUTATED, OUTPUTS = "mutated", "outputs"
"""The parts of what an exported program returns: new values of inputs the model changes in place, and the model's outputs."""


@dataclass
class LissomConfig(DynamoConfig):
    """The options of an export.

    The fields not listed are those of `lissom.compile`.

    Attributes:
        dynamic: whether sizes of the inputs may vary, by default. The others are those of `DynamoConfig`.
    """

    export_format: str = FORMAT  # pyright: ignore[reportIncompatibleVariableOverride]
    dynamic: bool = True
    passes: str = "exact"
    backend: str = "eager"
    goal: str | None = "latency"
    checks: str = "numeric"
    simulate: bool = False

    def settings(self) -> Settings:
        """The options as settings of a compile, which checks them."""
        named = {name: getattr(self, name) for name in ("passes", "backend", "goal", "checks", "simulate")}
        return Settings(progress=lambda what, done, total: None, **named)


class LissomExporter(DynamoExporter):
    """Exports models of transformers as programs compiled by Lissom.

    `export` gives one program, `export_for_generation` one for each stage. What they return is called like the model, and
    `save_pretrained` writes it without pickle, so that `ExportedModel.from_pretrained` needs no `trust_remote_code`.
    """

    export_format = FORMAT
    config_class = LissomConfig
    program_suffix = ".lissom"
    requires_trust_remote_code = False
    tested_versions: dict[str, str] = {}  # noqa: RUF012

    def export_program(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: LissomConfig
    ) -> tuple[CompiledModel, ExportMetadata]:
        """The model compiled, and what transformers records of it.

        Raises:
            CaptureError: if the model cannot be captured; else what `lissom.compile` raises.
        """
        started = time.perf_counter()
        settings = config.settings()
        check_settings(settings)
        name = type(model).__name__
        flags = {key: value for key, value in sample_inputs.items() if key in _OUTPUT_FLAGS}
        try:
            inputs = {key: _whole_windows(value) for key, value in sample_inputs.items()}
            exported, metadata = super().export_program(model, inputs, config)
        # transformers passes on whatever the model's code and torch.export raise.
        except Exception as error:
            raise CaptureError(f"{name} cannot be captured by transformers' exporter: {describe_failure(error)}") from error
        take = _Capturing(exported, model, flags, time.perf_counter() - started)
        return compile_captured(take, device_of(model, ()), settings), metadata

    @classmethod
    def save_program(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, program: CompiledModel, path: str | Path
    ) -> None:
        """Write one file that holds the program's artifact. Raises ArtifactError, UnsupportedError."""
        pack(program.save, Path(path))

    @classmethod
    def load_program(cls, path: str | Path) -> CompiledModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The program of a file. Raises ArtifactError if it holds none."""
        return load_packed(Path(path), load)


class LissomRunner(ModelRunner):
    """Runs a program that `LissomExporter` made, on the device it was exported on."""

    def __init__(self, model: CompiledModel, metadata: ExportMetadata) -> None:
        super().__init__(metadata)
        self.model = model
        self._order = list(metadata.kwargs)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @classmethod
    def from_program(cls, program: CompiledModel, metadata: ExportMetadata, device: str | torch.device | None = None) -> Self:
        """A runner for a program. Raises UnsupportedError for another device than the program's."""
        return cls(program if device is None else program.to(device), metadata)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: object) -> Any:
        """The outputs of the exported model; inputs that it changes in place, such as a cache of fixed size, are changed.

        `ExportedModel` drops arguments that were not exported, with a warning, before it calls this.

        Raises:
            InputError: if the arguments do not fit those of the export.
        """
        unknown = next((name for name, value in kwargs.items() if name not in self._order and value is not None), None)
        if unknown is not None:
            raise InputError(
                f"argument '{unknown}' was not exported; the model was exported with {', '.join(self._order)}: leave it out, "
                f"or export the model with it in the example"
            )
        given = {**self.metadata.in_constants, **kwargs}
        missing = next((name for name in self._order if name not in given), None)
        if missing is not None:
            raise InputError(f"argument '{missing}' is missing; the model was exported with {', '.join(self._order)}")
        leaves = pytree.tree_leaves({name: given[name] for name in self._order})
        names = [argument.name for argument in self.model.program.signature.keyword]
        if len(leaves) != len(names):
            raise InputError(
                f"the arguments {', '.join(self._order)} hold {len(leaves)} tensors and numbers, and were exported with "
                f"{len(names)}; pass caches of the form that the model was exported with"
            )
        flat = dict(zip(names, leaves, strict=True))
        outputs: dict[str, Any] = self.model(**flat)
        with torch.no_grad():
            for name, value in outputs[MUTATED].items():
                flat[name].copy_(value)
        return pytree.tree_unflatten(outputs[OUTPUTS], self.out_spec)


@dataclass(frozen=True)
class _Capturing:
    """Converts a program of torch.export into one whose arguments are the leaves of the original's, by name.

    Attributes:
        model: that was exported, for comparison.
        flags: the outputs it was asked for.
        seconds: that its export took.
    """

    exported: ExportedProgram
    model: PreTrainedModel
    flags: Mapping[str, Any]
    seconds: float

    def __call__(self) -> Capture:
        started = time.perf_counter()
        assert self.exported.example_inputs is not None
        args, kwargs = self.exported.example_inputs
        leaves, nesting = pytree.tree_flatten((args, kwargs))
        # Afterwards, writes into inputs are outputs.
        exported = self.exported.run_decompositions({})
        names = [str(spec.arg.name) for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
        mutated = _return_mutated(exported)
        _tie_lengths(exported)
        flat = dict(zip(names, leaves, strict=True))
        program = flatten_exported(exported, type(self.model).__name__, (), flat, (), has_caches=True)
        count = len(program.leaves) - len(mutated)
        _, spec = pytree.tree_flatten({MUTATED: dict.fromkeys(mutated, 0), OUTPUTS: [0] * count})
        program.signature = replace(program.signature, out_spec=spec)
        config = patch_model_config(self.model, dict(self.flags))
        # With these patches the exporter captured it: a cache keeps what is behind a sliding window, too.
        with evaluating(self.model), torch.no_grad(), config, apply_patches(DynamoExporter.export_format):
            confirmed = confirm(_only_tensors(program), _ByLeaves(self.model, nesting, names, mutated), (), flat)
        program.signature = replace(program.signature, dimensions=confirmed.signature.dimensions)
        example = program.signature.flatten((), flat)
        notes = ("captured by transformers' exporter", describe_dimensions(program.signature))
        return Capture(program, example, notes, self.seconds + time.perf_counter() - started)


class _ByLeaves(nn.Module):
    """A model that takes the leaves of its arguments by name, and returns the tensors of its output.

    Attributes:
        nesting: of the arguments.
        names: of the leaves.
        mutated: those that the model changes in place.
    """

    def __init__(self, model: nn.Module, nesting: pytree.TreeSpec, names: Sequence[str], mutated: Sequence[str]) -> None:
        super().__init__()
        self.model, self.nesting, self.names, self.mutated = model, nesting, names, mutated

    def forward(self, **leaves: object) -> dict[str, object]:
        own = {name: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for name, leaf in leaves.items()}
        args, kwargs = pytree.tree_unflatten([own[name] for name in self.names], self.nesting)
        outputs = [leaf for leaf in pytree.tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        return {MUTATED: {name: own[name] for name in self.mutated}, OUTPUTS: outputs}


def _only_tensors(program: Program) -> Program:
    """The program without the sizes that a cache in its output holds."""
    trimmed = program.copy()
    trimmed.output.args = (tuple(leaf for leaf in trimmed.leaves if nodes.is_tensor(leaf)),)
    return trimmed


def _whole_windows(value: Any) -> Any:
    """A cache whose layers with a sliding window are as long as the others, with zeros that the window hides.

    transformers captures such a layer as one that keeps all tokens, and what it gives as an example has cut them off.
    """
    if not isinstance(value, DynamicCache):
        return value
    widened = copy.copy(value)
    widened.layers = [copy.copy(layer) for layer in value.layers]
    for layer in widened.layers:
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
            missing = layer.cumulative_length - layer.keys.shape[2]
            layer.keys, layer.values = (functional.pad(each, (0, 0, missing, 0)) for each in (layer.keys, layer.values))
    return widened


def _tie_lengths(exported: ExportedProgram) -> None:
    """Make all layers of a cache equally long, and a padding mask as long as the cached and the new tokens, if the example is.

    Export keeps a symbol for each: the model cuts the mask to that length, and would pad a shorter one.
    """
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    names = [str(spec.arg.name) for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    inputs = [values[name] for name in names]
    caches = [place for place, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.dim() == 4]
    mask, ids = values.get("attention_mask"), values.get("input_ids")
    if mask is None or ids is None or not caches or mask.dim() != 2:
        return
    of_tokens, of_both = (frozenset({(names.index(name), 1)}) for name in ("input_ids", "attention_mask"))
    of_cache = frozenset((place, 2) for place in caches)
    tie_lengths(inputs, CacheLengths(ids.shape[1], inputs[caches[0]].shape[2], of_cache, of_tokens, of_both))


def _return_mutated(exported: ExportedProgram) -> list[str]:
    """Make the new values of inputs that are changed in place ordinary outputs, the first ones; returns the inputs' names."""
    names = list[str]()
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            names.append(str(spec.target))
            spec.kind = OutputKind.USER_OUTPUT
    return names


register_backend(LissomExporter, LissomRunner)
