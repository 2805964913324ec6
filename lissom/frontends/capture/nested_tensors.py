"""`nn.TransformerEncoder` without nested tensors: for an export, its forward is exchanged for one with the same outputs.

In evaluation mode PyTorch leaves padding tokens out and writes zeros at their positions, if every row has its padding at the
end, and not while it is traced. Which of the two it does depends on the values of the mask:

    output = where(every row's padding is at its end, masked_fill(layers(x), padding, 0), layers(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lissom.frontends.capture.isolation import exchanged


@contextmanager
def encoders_without_nesting(model: nn.Module) -> Generator[None]:
    """Exchange the forward of PyTorch's encoders in exports, until the block ends."""
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and _inherits_forward(module):
                stack.enter_context(exchanged(module, "forward", _while_exporting(module)))
        yield


def _inherits_forward(module: nn.TransformerEncoder) -> bool:
    """True unless its class or its owner replaced the forward."""
    return "forward" not in vars(module) and type(module).forward is nn.TransformerEncoder.forward


def _while_exporting(module: nn.TransformerEncoder) -> Callable[..., torch.Tensor]:
    own = module.forward

    def forward(
        src: torch.Tensor,
        mask: torch.Tensor | None = None,
        src_key_padding_mask: torch.Tensor | None = None,
        is_causal: bool | None = None,
    ) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            return own(src, mask, src_key_padding_mask, is_causal)
        padding = None if src_key_padding_mask is None or mask is not None else _left_out(module, src, src_key_padding_mask)
        if padding is not None and src_key_padding_mask is not None and src_key_padding_mask.is_floating_point():
            # PyTorch's fused layers take any number but 0 for padding.
            src_key_padding_mask = src_key_padding_mask.masked_fill(src_key_padding_mask != 0, -torch.inf)
        output = src
        for layer in module.layers:
            # A hint only: without it the layer applies the mask that is given.
            output = layer(output, src_mask=mask, is_causal=False, src_key_padding_mask=src_key_padding_mask)
        if padding is not None:
            output = output.masked_fill(padding.unsqueeze(-1), 0.0)
        return output if module.norm is None else module.norm(output)

    return forward


def _left_out(module: nn.TransformerEncoder, src: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """The tokens that the encoder leaves out: padding, if each row has it at the end; None where it never does.

    Args:
        mask: [batch, tokens], true or not zero at padding. Returns booleans [batch, tokens].
    """
    nests = getattr(module, "use_nested_tensor", False)
    if not (torch.backends.mha.get_fastpath_enabled() and nests and src.dim() == 3):
        return None
    padding = mask if mask.dtype is torch.bool else mask != 0
    elsewhere = (padding[:, :-1] & ~padding[:, 1:]).any()
    return padding & ~elsewhere
