"""What an answer should be, and whether one is right: plain PyTorch and float64, nothing of Lissom's verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

EXACT_FACTOR, EXACT_FLOOR = 20.0, 5e-5
"""An exact answer may be 20 times as far from float64 as PyTorch's own float32 is, because it sums in another order.
It may be off by 5e-5 of the output's size in any case, because PyTorch's own error can be zero in outputs of a few numbers."""
LIMITS = {"fp32": 2e-3, "bf16": 0.15, "quantized": 0.35}
"""How far a compiled program may be from the same program before lowering, as a share of the size of the output.

fp32: both compute the same in float32. 2e-3 leaves room for the sums of linear attention and for ill-conditioned factors.
bf16: a kernel rounds to 8 bits at other places than the operators it replaces, some tens of times.
quantized: a value between two integers may round to the other one. In tiny models one step of int4 or fp8 is a tenth of the
output. A wrong scale, mask or layout is off by about 1.
"""


def differs_from_float64(
    found: Sequence[object], plain: Sequence[torch.Tensor], precise: Sequence[torch.Tensor], kept: torch.Tensor | None
) -> str | None:
    """Why an answer is not that of the model; None when it is.

    plain, precise: the model's outputs in float32 and float64. kept: [batch, tokens], the tokens whose values count; None
        counts all.
    """
    sentence = _form_differs(found, plain)
    if sentence is not None:
        return sentence
    for at, (a, b, exact) in enumerate(zip(found, plain, precise, strict=True)):
        assert isinstance(a, torch.Tensor)
        sentence = _places_differ(a, b)
        if sentence is not None:
            return f"output {at}: {sentence}"
        counted = _counted(exact, kept if exact.dim() == 3 else None) & torch.isfinite(exact)
        allowed = EXACT_FACTOR * _error(b, exact, counted) + EXACT_FLOOR
        error = _error(a, exact, counted)
        if error > allowed:
            return f"output {at} is off by {error:.1e} of its size, and PyTorch's float32 allows {allowed:.1e}"
    return None


AS_FAR = 2.0
"""A compiled program may be twice as far from the program before lowering as that is from itself when it rounds otherwise."""


def differs_from_program(
    found: Sequence[object],
    wanted: Sequence[torch.Tensor],
    precision: str,
    kept: torch.Tensor | None = None,
    rounded: Callable[[], Iterable[Sequence[torch.Tensor]]] = tuple,
) -> str | None:
    """Why a compiled program's answer is not that of the program before lowering.

    precision: a key of `LIMITS`. kept: as above; in bfloat16 the score of a query that sees padding alone is all rounding.
    rounded: what the program before lowering gives where it rounds otherwise. It is asked where the limit is passed: a model
        may be ill-conditioned, and a router that has to choose between two experts turns on the last bit.
    """
    sentence = _form_differs(found, wanted)
    if sentence is not None:
        return sentence
    for at, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert isinstance(a, torch.Tensor)
        # A query that sees nothing through a mask of -inf is NaN after a softmax and zero after an attention.
        sentence = _places_differ(a, b.where(~torch.isnan(b), a))
        if sentence is not None:
            return f"output {at}: {sentence}"
        counted = _counted(b, kept)
        error, allowed = _mean_error(a, b, counted), LIMITS[precision]
        if error > allowed:
            allowed = max(allowed, AS_FAR * max((_mean_error(other[at], b, counted) for other in rounded()), default=0.0))
        if error > allowed:
            return f"output {at} is off by {error:.1e} of its size, and {precision} allows {allowed:.1e}"
    return None


def _form_differs(found: Sequence[object], wanted: Sequence[torch.Tensor]) -> str | None:
    if len(found) != len(wanted):
        return f"{len(found)} outputs in place of {len(wanted)}"
    for at, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            shown = f"{a.dtype} {list(a.shape)}" if isinstance(a, torch.Tensor) else repr(a)
            return f"output {at} is {shown} in place of {b.dtype} {list(b.shape)}"
    return None


def _places_differ(found: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """Why the numbers that are not finite are not at the same places."""
    a, b = ~torch.isfinite(found), ~torch.isfinite(wanted)
    if torch.equal(a, b):
        return None
    return f"{int((a & ~b).sum())} numbers are not finite where they should be, {int((b & ~a).sum())} the other way round"


def _counted(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The values of real tokens, or of rows without padding, where one token of each row is returned."""
    counted = torch.ones(values.shape, dtype=torch.bool)
    if kept is None or values.shape[0] != kept.shape[0]:
        return counted
    if values.dim() == 3 and values.shape[1] == kept.shape[1]:
        return counted & kept[..., None]
    return counted & kept.all(1)[:, None] if values.dim() == 2 else counted


def _error(found: torch.Tensor, wanted: torch.Tensor, counted: torch.Tensor) -> float:
    """The largest difference, as a share of the root mean square of what is wanted."""
    if not counted.any():
        return 0.0
    a, b = found.double()[counted], wanted.double()[counted]
    return float((a - b).abs().max() / b.square().mean().sqrt().clamp_min(1e-6))


def _mean_error(found: torch.Tensor, wanted: torch.Tensor, counted: torch.Tensor) -> float:
    """The root mean square of the differences, as a share of that of what is wanted."""
    counted = counted & torch.isfinite(wanted)
    if not counted.any():
        return 0.0
    a, b = found.double()[counted], wanted.double()[counted]
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-6))
