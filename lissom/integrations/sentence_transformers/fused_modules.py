"""The modules of a Sentence Transformers model as one module, from token ids to embeddings or scores."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Features = Mapping[str, Any]
Constant = bool | int | float | str | None

EMBEDDING, TOKENS, SCORES, MASK = "sentence_embedding", "token_embeddings", "scores", "attention_mask"
"""Names of features in Sentence Transformers."""


class FusedModules(nn.Module):
    """A chain of modules of Sentence Transformers that passes on a dictionary of features.

    Token embeddings that are returned are zero at padding positions. The modules after the transformer give the same, since
    pooling skips padding, and `pack-tokens` need not compute it.

    Args:
        modules: the chain.

    Attributes:
        constants: features that are no tensors, fixed when the chain is captured.
        outputs: the features it returns.
        config: of the transformer.
        main_input_name: of the transformer.
    """

    main_input_name = "input_ids"
    input_modalities = "text"

    def __init__(
        self, modules: Iterable[nn.Module], constants: Mapping[str, Constant], outputs: Sequence[str], config: object
    ) -> None:
        super().__init__()
        self.chain = nn.ModuleList(modules)
        self.constants = dict(constants)
        self.outputs = tuple(outputs)
        self.config = config

    def run(self, features: Features) -> dict[str, torch.Tensor]:
        """The outputs for tensor features, by name."""
        first, *others = self.chain
        values: dict[str, Any] = first({**features, **self.constants})
        if TOKENS in self.outputs and MASK in features:
            tokens = values[TOKENS]
            values[TOKENS] = tokens * features[MASK].unsqueeze(-1).to(tokens.dtype)
        for module in others:
            values = module(values)
        return {name: values[name] for name in self.outputs}


class WholeSplade(nn.Module):
    """`SpladePooling` over all tokens at once; its loop over chunks would fix the number of tokens.

    y[v] = max over t, or sum over t, of log(1 + relu(x[t, v])), applied twice where the activation is `log1p_relu`
    """

    def __init__(self, pooling: Any) -> None:
        super().__init__()
        self.takes_max = pooling.pooling_strategy == "max"
        self.logs = 2 if pooling.activation_function == "log1p_relu" else 1

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        logits = features[TOKENS]
        weights = (logits * features[MASK].unsqueeze(-1).to(logits.dtype)).relu()
        for _ in range(self.logs):
            weights = weights.log1p()
        return {**features, EMBEDDING: weights.amax(dim=1) if self.takes_max else weights.sum(dim=1)}


def fuse(
    name: str,
    arguments: Sequence[str],
    modules: Iterable[nn.Module],
    constants: Mapping[str, Constant],
    outputs: Sequence[str],
    config: object,
) -> FusedModules:
    """The modules as one, whose forward takes the named tensors; the class has this name."""

    def forward(self: FusedModules, **features: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.run(features)

    # torch.export reads the names of the inputs from the signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(parameter, kind) for parameter in ("self", *arguments)])
    made: type[FusedModules] = type(name, (FusedModules,), {"forward": forward, "__doc__": FusedModules.__doc__})
    return made(modules, constants, outputs, config)


def split_features(features: Features) -> tuple[dict[str, torch.Tensor], dict[str, Constant]]:
    """The tensors among the features, and those that are numbers, flags or text."""
    tensors = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in features.items() if value is None or isinstance(value, (bool, int, float, str))}
    return tensors, constants
