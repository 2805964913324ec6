"""Tests of lissom.compiler.verify.equality."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.verify.equality import require_equal
from lissom.errors import VerifyError
from tests.models import capture_of


def test_an_output_that_became_nan_is_refused_although_no_node_differs() -> None:
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
