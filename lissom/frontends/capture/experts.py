"""Mixtures of experts that loop over the experts a batch was routed to: for a capture, every expert computes every token.

torch.export records one path for all inputs, and which experts have tokens depends on the values. The loops of four families of
transformers are exchanged during the export,

    output[t] = sum over experts e of gate[e, t] · expert_e(x[t]),
    gate[e, t] = sum over choices k of hit[e, k, t] · weight[t, k],

which is the same sum with terms of gate 0 added; other families choose such a form by `experts_implementation`. Outside of the
export the model's own code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lissom.frontends.capture.isolation import exchanged

Expert = Callable[[int, torch.Tensor], torch.Tensor]
Forward = Callable[..., torch.Tensor]


@contextmanager
def experts_for_all_tokens(model: nn.Module) -> Generator[None]:
    """Exchange the loops, and the conversions of routers to the dtype they have, until the block ends."""
    with ExitStack() as stack:
        for module in model.modules():
            name = type(module).__name__
            if name in _FORWARDS and type(module).__module__.startswith("transformers."):
                stack.enter_context(exchanged(module, "forward", _while_exporting(module.forward, _FORWARDS[name], module)))
            router: Any = module
            if name in _ROUTERS and router.classifier.weight.dtype == router.dtype:
                stack.enter_context(exchanged(router.classifier, "to", _same(router.classifier)))
        yield


def _while_exporting(own: Forward, replacement: Forward, module: nn.Module) -> Forward:
    def forward(*args: torch.Tensor) -> torch.Tensor:
        return replacement(module, *args) if torch.compiler.is_exporting() else own(*args)

    return forward


def _same(layer: object) -> Callable[..., object]:
    return lambda *_: layer


def _mixture(x: torch.Tensor, hits: torch.Tensor, weights: torch.Tensor, expert: Expert, count: int) -> torch.Tensor:
    """The weighted sum of the experts.

    Args:
        x: [tokens, width].
        hits: [experts, choices, tokens].
        weights: [tokens, choices].
    """
    gates = (hits[:count] * weights.T).sum(1).to(x.dtype)
    mixed = torch.zeros_like(x)
    for index in range(count):
        gate = gates[index, :, None]
        # Not a product with 0, since an expert may overflow on tokens that were not routed to it.
        mixed = mixed + torch.where(gate == 0, 0, expert(index, x) * gate)
    return mixed


def _hits(chosen: torch.Tensor, count: int) -> torch.Tensor:
    """One-hot expert choices of the tokens, [experts, choices, tokens].

    Args:
        chosen: [tokens, choices].
    """
    return functional.one_hot(chosen, count).permute(2, 1, 0)


def _switch(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _mixture(x, chosen.permute(2, 1, 0), weights, _numbered(module), module.num_experts)


def _nllb(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    mixed = _mixture(x, _hits(chosen, module.num_experts), weights, _numbered(module), module.num_experts)
    return mixed * (1 - module.moe_token_dropout) if module.moe_token_dropout > 0 else mixed


def _numbered(module: Any) -> Expert:
    return lambda index, x: module[f"expert_{index}"](x)


def _dbrx(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    rows, count, sizes = x.shape[0], module.num_experts, (-1, module.ffn_hidden_size, module.hidden_size)
    w1, v1, w2 = (weight.view(sizes) for weight in (module.mlp.w1, module.mlp.v1, module.mlp.w2))
    tokens = x.reshape(-1, module.hidden_size)
    mixed = _mixture(tokens, _hits(chosen, count + 1), weights, lambda e, h: module.mlp(h, w1[e], v1[e], w2[e]), count)
    return mixed.view(rows, -1, module.hidden_size)


def _longcat(module: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    def expert(index: int, tokens: torch.Tensor) -> torch.Tensor:
        if index >= module.num_routed_experts or module.gate_up_proj is None:
            return tokens
        gate, up = functional.linear(tokens, module.gate_up_proj[index]).chunk(2, -1)
        return functional.linear(module.act_fn(gate) * up, module.down_proj[index])

    return _mixture(x, _hits(chosen, module.total_experts), weights, expert, module.total_experts)


_FORWARDS: Mapping[str, Forward] = {
    "SwitchTransformersExperts": _switch,
    "NllbMoeExperts": _nllb,
    "DbrxExperts": _dbrx,
    "LongcatFlashExperts": _longcat,
}
_ROUTERS = ("SwitchTransformersTop1Router", "NllbMoeTop2Router")
"""Routers whose forward assigns `classifier.to(dtype)`, which no export takes."""
