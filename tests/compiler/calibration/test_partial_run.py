"""Tests of lissom.compiler.calibration.partial_run."""

from __future__ import annotations

import torch

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.partial_run import Stream
from lissom.compiler.ir.editor import Editor
from tests.support import captures
from tests.support.models import tiny_bert


def test_a_stream_arrives_at_what_a_run_gives() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    data = [program.signature.flatten((), case.kwargs)] * 2
    wanted: dict[torch.fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        program.run(data[0], lambda node, value: wanted.update({node: value}))
    stream = Stream(program, data)
    downs = [site.down for site in program.fact(structure).feed_forward]
    for down in downs:
        before = input_of(down)
        for sample in range(2):
            (seen,) = stream.peek(sample, [before])
            (found,) = stream.advance(sample, down, [down])
            # What is held between two layers has eleven bits.
            torch.testing.assert_close(seen, wanted[before], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(found, wanted[down], rtol=2e-3, atol=2e-3)


def test_a_weight_may_be_wanted() -> None:
    """Found by tools/fuzz: the mask of an attention is a weight where no size varies."""
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    stream = Stream(program, [program.signature.flatten((), case.kwargs)])
    down = program.fact(structure).feed_forward[0].down
    weight = down.args[1]
    assert stream.advance(0, down, [weight])[0] is program.weight(str(weight.target))
    assert stream.peek(0, [weight])[0] is program.weight(str(weight.target))


def test_little_is_held_between_layers() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    stream = Stream(program, [program.signature.flatten((), case.kwargs)])
    site = program.fact(structure).feed_forward[0]
    stream.advance(0, site.residual)
    # The sum, the mask, and sizes.
    assert sum(isinstance(value, torch.Tensor) for value in stream._held[0].values()) <= 3


def test_values_beyond_float16_are_held_unchanged() -> None:
    program = captures.optimize(
        torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.ReLU()), torch.ones(2, 4)
    ).program
    for size in (1e6, 1e-6):
        data = [[torch.full((2, 4), size)]]
        stream = Stream(program, data)
        (found,) = stream.advance(0, next(iter(program.nodes())), [next(iter(program.nodes()))])
        (seen,) = stream.peek(0, [program.nodes()[1]])
        torch.testing.assert_close(seen, found.relu(), rtol=0, atol=0)


def test_a_weight_set_behind_a_sample_counts() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program.copy()
    stream = Stream(program, [program.signature.flatten((), case.kwargs)])
    site = program.fact(structure).feed_forward[0]
    stream.advance(0, input_of(site.up[0]))
    weight = site.down.args[1]
    Editor(program, "test").set_weight(weight, torch.zeros_like(program.weight(str(weight.target))))
    (found,) = stream.peek(0, [site.down])
    bias = program.weight(str(site.down.args[2].target))
    torch.testing.assert_close(found, bias.expand_as(found))
