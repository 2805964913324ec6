"""Tests of lissom.backends.eager.node_times."""

import torch

from lissom.backends.eager.node_times import time_nodes
from tests.support import captures
from tests.support.models import captured, counter, normal


def test_every_node_is_timed_in_order_of_program():
    program = captured("feed_forward")
    taken = time_nodes(program, [normal(2, 5, 8)], 0.0)
    assert list(taken) == program.nodes()
    assert all(milliseconds > 0 for milliseconds in taken.values())


def test_state_of_program_and_model_is_unchanged():
    case = counter()
    compiled = captures.compile(case.model, case.inputs)
    before = [tensor.clone() for tensor in (*compiled.program.state_values(), *compiled.state().values())]
    time_nodes(compiled.program, list(case.args), 0.0)
    after = [*compiled.program.state_values(), *compiled.state().values()]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
