"""Calls of a large model and its program with the weights of one layer in all layers that are alike.

A model that is compiled from the disk is compared with its program once with its own weights, and then on other inputs with
those of a single layer of each form, which the memory holds: the code of a model does not depend on the values of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import nn

from lissom.compiler.ir.program import Program
from lissom.compiler.paging import SPILLED, is_paged
from lissom.errors import CaptureError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@contextmanager
def layers_alike(model: nn.Module, program: Program | None = None) -> Generator[None]:
    """Let all layers of one form read the weights of the first of them, while a model is compiled from the disk."""
    if not is_paged():
        yield
        return
    first: dict[object, torch.Tensor] = {}
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    given = [*model.named_parameters(remove_duplicate=False), *([] if program is None else program.weights().items())]
    state = () if program is None else program.state
    for name, weight in given:
        if weight.nbytes >= SPILLED and name not in state:
            form = _NUMBER.sub("*", name), weight.shape, weight.stride(), weight.dtype
            own.append((weight, weight.data))
            first.setdefault(form, weight.data)
            weight.data = first[form]
    try:
        yield
    finally:
        for weight, data in reversed(own):  # a weight may be there twice
            weight.data = data


def compare_alike(model: nn.Module, program: Program, compare: Callable[[], None]) -> None:
    """Compare a model and its program with layers alike; a difference counts if they have it with their own weights too.

    A layer that is repeated may amplify rounding far beyond what the layers of the model do.

    Args:
        compare: raises CaptureError if they differ; may be called twice.
    """
    try:
        with layers_alike(model, program):
            compare()
    except CaptureError:
        if not is_paged():
            raise
        compare()
