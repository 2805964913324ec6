"""The size options of passes that factor a layer: a rank, a fraction of the energy, or a fraction of the bytes."""

from __future__ import annotations

from lissom.errors import UnsupportedError


def check_amount(name: str, *, rank: int | None, keep: float | None, budget: float | None, amounts: str = "") -> None:
    """Check the size options of a pass of this name.

    Args:
        amounts: those of single layers, which may stand alone.

    Raises:
        UnsupportedError: unless exactly one is given, rank of 1 or more, keep in (0, 1], budget in (0, 1).
    """
    given = [option for option, value in (("rank", rank), ("keep", keep), ("budget", budget)) if value is not None]
    if len(given) != 1 and not (amounts and not given):
        options = " and ".join(f"{option}=" for option in given) if given else "none"
        raise UnsupportedError(
            f"{name} takes one of rank=, keep= and budget=, and was given {options}: write for example "
            f"{name}{{budget=0.5}} for half of the bytes"
        )
    if rank is not None and rank < 1:
        raise UnsupportedError(f"{name} takes rank= of 1 or more, not {rank}")
    if keep is not None and not 0 < keep <= 1:
        raise UnsupportedError(f"{name} keeps a fraction of the energy above 0 and up to 1, not keep={keep:g}")
    if budget is not None and not 0 < budget < 1:
        raise UnsupportedError(f"{name} leaves a fraction of the bytes above 0 and below 1, not budget={budget:g}")
