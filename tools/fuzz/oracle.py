"""Checks of outputs against plain PyTorch and float64, independent of Lissom's verifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

EXACT_FACTOR, EXACT_FLOOR = 20.0, 5e-5
"""An exact pipeline may have 20 times the error of PyTorch's float32 against float64, because it sums in another order.
An error of 5e-5 of the output's size is always allowed, because PyTorch's own error can be zero in outputs of a few numbers."""
LIMITS = {"fp32": 2e-3, "bf16": 0.15, "quantized": 0.35}
"""The allowed error of a compiled program against the program before lowering, relative to the size of the output.

fp32: both compute the same in float32. 2e-3 leaves room for the sums of linear attention and for ill-conditioned factors.
bf16: a kernel rounds to 8 bits at other places than the operators it replaces, some tens of times.
quantized: a value between two integers may round to the other one. In tiny models one step of int4 or fp8 is a tenth of the
output. A wrong scale, mask or layout has an error of about 1.
"""


def differs_from_float64(
    actual: Sequence[object], plain: Sequence[torch.Tensor], precise: Sequence[torch.Tensor], kept: torch.Tensor | None
) -> str | None:
    """The reason outputs differ from those of the model; None if they do not.

    plain, precise: the model's outputs in float32 and float64. kept: [batch, tokens], the tokens whose values count; None
        counts all.
    """
    sentence = _form_differs(actual, plain)
    if sentence is not None:
        return sentence
    for at, (a, b, exact) in enumerate(zip(actual, plain, precise, strict=True)):
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
"""A compiled program may differ from the program before lowering by twice what other rounding changes in the latter."""


def differs_from_program(
    actual: Sequence[object],
    wanted: Sequence[torch.Tensor],
    precision: str,
    kept: torch.Tensor | None = None,
    rounded: Callable[[], Iterable[Sequence[torch.Tensor]]] = tuple,
) -> str | None:
    """The reason a compiled program's outputs differ from those of the program before lowering; None if they do not.

    precision: a key of `LIMITS`. kept: as above; in bfloat16 the scores of a query that sees padding only are rounding noise.
    rounded: the outputs of the program before lowering under other rounding. It is called if the limit is exceeded: a model
        may be ill-conditioned, and the last bit can decide which expert a router chooses.
    """
    sentence = _form_differs(actual, wanted)
    if sentence is not None:
        return sentence
    for at, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert isinstance(a, torch.Tensor)
        # A query without visible keys under a mask of -inf gives NaN after a softmax and zero after an attention operator.
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


def _form_differs(actual: Sequence[object], wanted: Sequence[torch.Tensor]) -> str | None:
    if len(actual) != len(wanted):
        return f"{len(actual)} outputs in place of {len(wanted)}"
    for at, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        if not isinstance(a, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            shown = f"{a.dtype} {list(a.shape)}" if isinstance(a, torch.Tensor) else repr(a)
            return f"output {at} is {shown} in place of {b.dtype} {list(b.shape)}"
    return None


def _places_differ(actual: torch.Tensor, wanted: torch.Tensor) -> str | None:
    """The reason the positions of NaN and infinity differ; None if they do not."""
    a, b = ~torch.isfinite(actual), ~torch.isfinite(wanted)
    if torch.equal(a, b):
        return None
    return f"{int((a & ~b).sum())} numbers are not finite where they should be, {int((b & ~a).sum())} the other way round"


def _counted(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """The values of real tokens, or of rows without padding if one token per row is returned."""
    counted = torch.ones(values.shape, dtype=torch.bool)
    if kept is None or values.shape[0] != kept.shape[0]:
        return counted
    if values.dim() == 3 and values.shape[1] == kept.shape[1]:
        return counted & kept[..., None]
    return counted & kept.all(1)[:, None] if values.dim() == 2 else counted


def _error(actual: torch.Tensor, wanted: torch.Tensor, counted: torch.Tensor) -> float:
    """The largest difference, relative to the root mean square of the reference."""
    if not counted.any():
        return 0.0
    a, b = actual.double()[counted], wanted.double()[counted]
    return float((a - b).abs().max() / b.square().mean().sqrt().clamp_min(1e-6))


def _mean_error(actual: torch.Tensor, wanted: torch.Tensor, counted: torch.Tensor) -> float:
    """The root mean square of the differences, relative to that of the reference."""
    counted = counted & torch.isfinite(wanted)
    if not counted.any():
        return 0.0
    a, b = actual.double()[counted], wanted.double()[counted]
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-6))
