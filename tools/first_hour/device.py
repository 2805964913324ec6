"""The GPU of this process, or a pretended one."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from tools.first_hour.results import UsageError

PRETENDED_CARD = "Pretended GPU"
NO_GPU = "PyTorch finds no GPU here; run this on a machine with one, or try it without one by --pretend"


@contextmanager
def device(pretend: bool) -> Generator[torch.device]:
    """The device, until the block ends.

    Raises:
        UsageError: where there is no GPU and none is pretended.
    """
    if not pretend:
        require_gpu()
        yield torch.device("cuda", 0)
        return
    from tools.pretend_cuda import pretend_cuda  # imports Dynamo

    with pretend_cuda(capability=(9, 0)) as pretended:
        yield pretended


def require_gpu() -> None:
    """Raise UsageError where there is no GPU."""
    if not torch.cuda.is_available():
        raise UsageError(NO_GPU)


def card_name(pretend: bool) -> str:
    """The name of the card."""
    if pretend:
        return PRETENDED_CARD
    require_gpu()
    return torch.cuda.get_device_name(0)
