"""Registration of Lissom's operators with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lissom.ops.dimensions import DECLARED, Dimensions

LIBRARY = torch.library.Library("lissom", "FRAGMENT")
"""The namespace of the operators."""


def define(
    schema: str,
    implementation: Callable[..., object],
    fake: Callable[..., object] | None = None,
    *,
    dimensions: Dimensions | None = None,
    backward: Callable[..., object] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> torch._ops.OpOverload[..., Any]:
    """Define `lissom::name`; returns its overload.

    Args:
        implementation: runs where there is no kernel.
        fake: the empty output for fake tensors; without it the operator is decomposed into the implementation.
        dimensions: what it does to dimensions, from which analyses are derived.
        backward: as in `torch.library.register_autograd`.
        setup_context: as in `torch.library.register_autograd`.
    """
    name = schema.partition("(")[0]
    pointwise = (torch.Tag.pointwise,) if dimensions is not None and dimensions.is_pointwise else ()
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *pointwise))
    LIBRARY.impl(name, implementation, "CompositeImplicitAutograd" if fake is None else "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"lissom::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"lissom::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    made = getattr(torch.ops.lissom, name).default
    if dimensions is not None:
        DECLARED[made] = dimensions
    return made
