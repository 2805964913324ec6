"""A sample's tensors at other sizes: rows and positions drawn from its own, or thinned out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lissom.compiler.ir.types import Size

Shape = Sequence[Size]


def drawn(
    example: Sequence[torch.Tensor], shapes: Sequence[Shape], wanted: Sequence[Sequence[int]], seed: int
) -> list[torch.Tensor]:
    """The tensors at the sizes `wanted`, from rows and positions of their own; see `Signature.resize`.

    Args:
        shapes: of the tensors; what is no integer varies, and what is equal is drawn alike.
    """
    draws: dict[tuple[object, int], int] = {}

    def picks(size: object, old: int, new: int, rows: int) -> torch.Tensor:
        """The indices to draw for each row; the first row is the same for any number of rows."""
        number = draws.setdefault((size, old), len(draws))
        return torch.randint(0, old, (rows, new), generator=torch.Generator().manual_seed(seed * 1000 + number))

    resized = list[torch.Tensor]()
    for tensor, shape, sizes in zip(example, shapes, wanted, strict=True):
        dims = _dynamic(shape)
        counts_up = tensor.dim() - 1 in dims and _counts_up(tensor)
        pairs = tensor.dim() > 1 and tensor.dim() - 1 in dims and shape[-1] == shape[-2]
        if pairs and _is_causal(tensor):
            tensor, dims = _causal(tensor, sizes[-1]), dims[:-2]
        rows = 1
        for dim in dims[:-1] if counts_up else dims:
            places = picks(shape[dim], tensor.shape[dim], sizes[dim], rows).to(tensor.device)
            if len(places) == 1:
                tensor = tensor.index_select(dim, places[0])
            else:
                tensor = torch.stack([row.index_select(dim - 1, place) for row, place in zip(tensor, places, strict=True)])
            # The queries of a mask over pairs of tokens are no rows: each sees the same keys, itself among them.
            rows = rows if pairs else sizes[dim] if dim == 0 else 1
        if counts_up:
            tensor = tensor[..., :1] + torch.arange(sizes[-1], dtype=tensor.dtype, device=tensor.device)
        resized.append(tensor)
    return resized


def thinned(tensor: torch.Tensor, shape: Shape, sizes: Sequence[int]) -> torch.Tensor:
    """Evenly spaced rows and positions of a tensor, the first and the last among them, so that padding stays where it is."""
    dims = _dynamic(shape)
    counts_up = tensor.dim() - 1 in dims and _counts_up(tensor)
    for dim in dims:
        places = torch.linspace(0, tensor.shape[dim] - 1, sizes[dim]).round().long()
        places = torch.arange(sizes[dim]) if counts_up and dim == tensor.dim() - 1 else places
        tensor = tensor.index_select(dim, places.to(tensor.device))
    return tensor


def _dynamic(shape: Shape) -> list[int]:
    return [dim for dim, size in enumerate(shape) if not isinstance(size, int)]


def _is_causal(tensor: torch.Tensor) -> bool:
    """True for masks over pairs of tokens with one value on and below the diagonal and another above it."""
    if tensor.numel() == 0 or tensor.shape[-1] < 3:
        return False
    return torch.equal(tensor, _causal(tensor, tensor.shape[-1]))


def _causal(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """The causal mask of another length."""
    seen, hidden = tensor[..., :1, :1], tensor[..., :1, -1:]
    later = torch.ones(length, length, dtype=torch.bool, device=tensor.device).triu(1)
    return torch.where(later, hidden, seen)


def _counts_up(tensor: torch.Tensor) -> bool:
    """True for position ids: integers that increase by one along the last dimension."""
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() == 0 or tensor.shape[-1] < 3:
        return False
    return bool((tensor.diff(dim=-1) == 1).all())
