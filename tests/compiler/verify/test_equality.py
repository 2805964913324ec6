"""Tests of lissom.compiler.verify.equality."""

from __future__ import annotations

import ctypes

import pytest
import torch

from lissom.compiler.verify.equality import _overlap, require_equal
from lissom.errors import VerifyError
from tests.support.models import capture_of

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


def test_nan_output_is_refused_although_no_node_differs() -> None:
    captured = capture_of("feed_forward")
    program, sample = captured.program, captured.example
    with torch.no_grad():
        wanted = [program.run(sample)]
    assert require_equal(program, program, [sample], wanted, wanted) == 0
    for value in (torch.nan, torch.inf):
        found = [[output.clone() for output in wanted[0]]]
        found[0][0].view(-1)[3] = value
        with pytest.raises(VerifyError, match="outputs differ from the program before by"):
            require_equal(program, program, [sample], wanted, found)
