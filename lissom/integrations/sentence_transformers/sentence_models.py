"""Compile models of Sentence Transformers whole: the transformer, pooling and the modules after it become one program.

The result is a model of the same class, with the methods of the original: `encode` of a `SentenceTransformer` and a
`SparseEncoder`, `predict` and `rank` of a `CrossEncoder`. Importing this file makes `lissom.compile` compile them so;
`import lissom` imports it once Sentence Transformers is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.model import BaseModel
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import nn
from transformers import PretrainedConfig

from lissom.artifacts.model_files import check_tokenizer
from lissom.artifacts.pruned_tokenizer import tokenizer_of_program
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.options import Metric
from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.driver.compile import compile_by_class, compile_model
from lissom.driver.options import Inputs, Settings, resolve_passes
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.capture.export import evaluating
from lissom.frontends.capture.failures import describe_failure
from lissom.frontends.models.huggingface import SENTENCES
from lissom.integrations.sentence_transformers.compiled_transformer import CompiledTransformer
from lissom.integrations.sentence_transformers.fused_modules import (
    EMBEDDING,
    SCORES,
    Constant,
    WholeSplade,
    fuse,
    split_features,
)
from lissom.passes.attention.linear_attention.linear_attention import LinearAttention
from lissom.passes.prune.pack_tokens.pack_tokens import PackTokens
from lissom.runtime.compiled_model import CompiledModel
from lissom.runtime.hosted_model import FixedModule

_Model = TypeVar("_Model", bound=BaseModel)
_KINDS = (SentenceTransformer, SparseEncoder, CrossEncoder)
_BATCH = 16
"""The texts of a batch of calibration data."""


@compile_by_class.register(BaseModel)
def compile_sentence_model(model: _Model, example_inputs: Inputs | None, settings: Settings) -> _Model:
    """A copy of the model whose modules run as one program. The model itself is not modified.

    example_inputs, and the data of the settings: texts, or pairs of texts for a `CrossEncoder`, or batches of features from
    `model.preprocess`. Without example inputs two sentences are used. A metric is called with a model of this class.
    `pack-tokens` is added to the passes, so that padding is not computed.

    Raises:
        LissomError: as `lissom.compile`.
    """
    fused, rest = _split(model)
    first = cast(Transformer, fused[0])
    example, constants = _features(model, example_inputs)
    outputs = _outputs(model, fused, example, constants)
    dimension = None if rest or isinstance(model, CrossEncoder) else model.get_embedding_dimension()  # pyright: ignore
    traced = [WholeSplade(module) if isinstance(module, SpladePooling) else module for module in fused]
    chain = fuse(type(model).__name__, list(example), traced, constants, outputs, _config_of(model, first))

    def with_program(program: FixedModule) -> _Model:
        names = [type(module).__name__ for module in fused]
        return _with_modules(model, CompiledTransformer.of(first, program, names, constants, dimension), rest)

    metric = settings.metric and _on_models(settings.metric, with_program, chain.config)
    settings = replace(settings, passes=_with_packing(settings.passes), data=_batches(model, settings.data), metric=metric)
    compiled = compile_model(chain, example, settings)
    if settings.dynamic is True:
        _check_sizes(compiled)
    if compiled.program.takes_new_ids:
        return _with_tokenizer(with_program(compiled), compiled.program)
    check_tokenizer(compiled.program, "input_ids", model.tokenizer)
    return with_program(compiled)


def _with_tokenizer(model: _Model, program: Program) -> _Model:
    """The compiled model with the tokenizer of its pruned vocabulary. Raises UnsupportedError for inputs besides text."""
    first: Any = next(iter(model.children()))
    if not hasattr(first.processor, "backend_tokenizer"):
        raise UnsupportedError(
            f"{program.name} reads more than text, and prune-vocabulary{{ids=tokenizer}} makes a tokenizer alone; use ids=graph"
        )
    first.processor = tokenizer_of_program(program, first.processor, None)
    return model


def _with_packing(passes: str | Pass | Sequence[Pass] | None) -> list[Pass]:
    """The passes with `pack-tokens` at the end, or before the first `linear-attention`, whose results it does not follow."""
    resolved = resolve_passes(passes)
    if not any(isinstance(pass_, PackTokens) for pass_ in resolved):
        at = next((at for at, pass_ in enumerate(resolved) if isinstance(pass_, LinearAttention)), len(resolved))
        resolved.insert(at, PackTokens())
    return resolved


def _split(model: BaseModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that become one program, and those after them that stay as they are.

    A module that takes arguments of `encode`, or whose result depends on the length of the prompt, stays.

    Raises:
        UnsupportedError: for a model of another kind, or one that does not start with a Transformer in PyTorch.
        CaptureError: if it is already compiled.
    """
    name = type(model).__name__
    if not isinstance(model, _KINDS):
        kinds = ", ".join(kind.__name__ for kind in _KINDS)
        raise UnsupportedError(f"a {name} cannot be compiled whole; of Sentence Transformers, Lissom compiles {kinds}")
    modules = list(model.named_children())
    first = modules[0][1]
    if isinstance(first, CompiledTransformer):
        raise CaptureError(f"this {name} is compiled already; compile the model it was made from")
    if not isinstance(first, Transformer) or not isinstance(first.model, nn.Module):
        kind = type(first).__name__ if not isinstance(first, Transformer) else f"Transformer on the backend '{model.backend}'"
        raise UnsupportedError(
            f"the first module of this {name} is a {kind}; Lissom compiles models that start with a Transformer in PyTorch"
        )
    asked = model.module_kwargs or {}
    last = next((at for at, (key, module) in enumerate(modules) if at and (asked.get(key) or _stays(module))), len(modules))
    return [module for _, module in modules[:last]], [module for _, module in modules[last:]]


def _stays(module: nn.Module) -> bool:
    return bool(getattr(module, "forward_kwargs", None)) or (isinstance(module, Pooling) and not module.include_prompt)


def _features(model: BaseModel, inputs: Inputs | None) -> tuple[dict[str, torch.Tensor], dict[str, Constant]]:
    """The tensor features of the inputs, and the others. Raises InputError."""
    if inputs is None:
        long, short = SENTENCES
        inputs = [(long, short), (short, short)] if isinstance(model, CrossEncoder) else [long, short]
    if isinstance(inputs, Mapping):
        return split_features(inputs)
    if not isinstance(inputs, (list, tuple)) or not inputs or not all(map(_is_text, inputs)):
        raise InputError("example_inputs= is neither a list of texts nor features; give texts, or model.preprocess(texts)")
    tensors, constants = split_features(model.preprocess(list(inputs)))
    return tensors, constants


def _is_text(value: object) -> bool:
    """True for a text, and for a pair of texts."""
    if isinstance(value, (list, tuple)):
        return len(value) == 2 and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def _batches(model: BaseModel, data: Iterable[Any]) -> Iterable[Any]:
    """Texts as batches of features, padded each to its longest; other data unchanged."""
    if isinstance(data, (str, bytes, Mapping, torch.Tensor)) or not isinstance(data, Iterable):
        return data  # refused by compile
    samples = list(data)
    if not samples or not all(map(_is_text, samples)):
        return [split_features(sample)[0] if isinstance(sample, Mapping) else sample for sample in samples] or data
    return [split_features(model.preprocess(samples[at : at + _BATCH]))[0] for at in range(0, len(samples), _BATCH)]


def _outputs(
    model: BaseModel, fused: Sequence[nn.Module], example: Mapping[str, torch.Tensor], constants: Mapping[str, Constant]
) -> list[str]:
    """The features that the fused modules add and that the model's methods or later modules read.

    Raises:
        CaptureError: if the modules fail on the example.
    """
    features: dict[str, Any] = {**example, **constants}
    with evaluating(model), torch.no_grad():
        try:
            for module in fused:
                features = module(features)
        # The modules may raise anything.
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs, before it is captured: {describe_failure(error)}"
            ) from error
    added = [name for name, value in features.items() if isinstance(value, torch.Tensor) and name not in example]
    # Logits of every token, as wide as the vocabulary, are not worth returning.
    single = {CrossEncoder: SCORES, SparseEncoder: EMBEDDING}
    return next(([name] for kind, name in single.items() if isinstance(model, kind) and name in added), added)


def _config_of(model: BaseModel, first: Transformer) -> PretrainedConfig:
    """The configuration of the transformer, with the class and the number of labels that the whole model has."""
    config = copy.deepcopy(first.config)
    config.architectures = [type(first.model).__name__]
    if isinstance(model, CrossEncoder) and config.num_labels != model.num_labels:
        config.num_labels = model.num_labels
    return config


class _Candidate(FixedModule):
    """A program in the place of a compiled model, for a metric."""

    def __init__(self, program: Program, config: object) -> None:
        super().__init__(program)
        self.config = config

    def forward(self, **tensors: torch.Tensor) -> object:
        return self.program(**tensors)


def _on_models(metric: Callable[[Any], float], with_program: Callable[[FixedModule], BaseModel], config: object) -> Metric:
    """The metric of a program, from one of a model of Sentence Transformers."""
    return lambda program: metric(with_program(_Candidate(program, config)))


def _check_sizes(compiled: CompiledModel) -> None:
    """Refuse a program for one number or length of texts only. Raises CaptureError."""
    for leaf in compiled.program.signature.tensors:
        fixed = next((dim for dim, size in enumerate(leaf.type.shape[:2]) if isinstance(size, int)), None)
        if fixed is not None:
            what = ("number", "length")[fixed]
            raise CaptureError(
                f"{compiled.program.name} computes with the {what} of its texts in a way that fixes it at "
                f"{leaf.type.shape[fixed]}; compile its transformer alone with dynamic=False for texts padded to that {what}"
            )


def _with_modules(model: _Model, module: nn.Module, rest: Sequence[nn.Module]) -> _Model:
    """A copy of the model with the module at its start, and the rest of its own modules after it."""
    made = copy.copy(model)
    names = list(model._modules)
    kept = dict(zip(names[len(names) - len(rest) :], rest, strict=True))
    made._modules = {names[0]: module, **kept}
    made.prompts = dict(model.prompts)
    made.model_card_data = copy.copy(model.model_card_data)
    card: Any = made.model_card_data
    card.register_model(made)
    made.clear_placement_cache()
    return made
