"""`nn.TransformerEncoder` without nested tensors: for an export, its forward is exchanged for one with the same outputs.

In evaluation mode PyTorch leaves padding tokens out and writes zeros at their positions, if every row has its padding at the
end, and not while it is traced. Which of the two it does depends on the values of the mask:

    output = where(every row's padding is at its end, masked_fill(layers(x), padding, 0), layers(x)).
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lissom.frontends.isolation import exchanged


@contextmanager
def encoders_without_nesting(model: nn.Module) -> Generator[None]:
    """Exchange the forward of PyTorch's encoders for the time of an export, until the block ends."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.TransformerEncoder:
                stack.enter_context(exchanged(module, "forward", _while_exporting(module)))
        yield


def _while_exporting(module: nn.TransformerEncoder):  # noqa: ANN202
    own = module.forward

    def forward(
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            return own(src, mask, src_key_padding_mask, is_causal)
        output = src
        for layer in module.layers:
            # A hint only: without it the layer applies the mask that is given.
            output = layer(output, src_mask=mask, is_causal=False, src_key_padding_mask=src_key_padding_mask)
        if src_key_padding_mask is not None and mask is None and _nests(module, src):
            output = _zeroed(output, src_key_padding_mask)
        return output if module.norm is None else module.norm(output)

    return forward


def _nests(module: nn.TransformerEncoder, src: torch.Tensor) -> bool:
    return bool(torch.backends.mha.get_fastpath_enabled() and module.use_nested_tensor and src.dim() == 3)


def _zeroed(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Zeros at padding positions if each row has its padding at the end. output: [batch, tokens, width]; mask: [batch, tokens]."""
    padding = mask if mask.dtype is torch.bool else mask != 0
    elsewhere = (padding[:, :-1] & ~padding[:, 1:]).any()
    return output.masked_fill((padding & ~elsewhere).unsqueeze(-1), 0.0)
