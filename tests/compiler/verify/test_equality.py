"""Tests of lissom.compiler.verify.equality."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lissom.compiler.verify.equality import _overlap

MEMORY = (ctypes.c_float * 24)()


def at(offset: int, *shape: int) -> torch.Tensor:
    """A tensor with a storage of its own in shared memory, as a chain returns a value and its view."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(MEMORY, dtype=torch.float32, count=count, offset=4 * offset).view(shape)


@pytest.mark.parametrize("swapped", [False, True])
def test_two_storages_of_unlike_length_at_one_address_overlap(swapped: bool) -> None:
    whole, view = at(0, 4, 6), at(0, 3)
    left, right = (view, whole) if swapped else (whole, view)
    assert left.untyped_storage().nbytes() != right.untyped_storage().nbytes()
    assert _overlap(left, right)


def test_rows_side_by_side_do_not_overlap() -> None:
    whole = torch.zeros(4, 6)
    assert not _overlap(whole[:2], whole[2:])
    assert _overlap(whole[:, :2], whole[1])
