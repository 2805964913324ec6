"""The table of a plan of tensor parallelism."""

from __future__ import annotations

import pytest

from lissom.compiler.parallel.plan import make_plan
from lissom.errors import UnsupportedError
from lissom.inspect.sharding import Link, joint_traffic, sharding_table, traffic
from lissom.inspect.tables import plain
from tests.support.canonical_programs import run_passes
from tests.support.sharding import partition, program_of

LINK = Link(latency_seconds=1e-5, bytes_per_second=1e9)


def test_the_bytes_of_a_rank_are_those_it_holds() -> None:
    program, samples = program_of("llama")
    after, _ = partition(program, samples, 2)
    (line,) = [
        line
        for line in plain(sharding_table(program, make_plan(program, 2), {}, LINK), 140).splitlines()
        if line.startswith("all ")
    ]
    ours = sum(
        weight.numel() * weight.element_size() for name, weight in after.weights().items() if not name.startswith("rank.")
    )
    assert f"{ours / 1e6:.3f}" in line
    assert "5 all-reduces, 1 all-gather" in line


def test_what_collectives_send() -> None:
    program, _ = program_of("llama")
    plan = make_plan(program, 4)
    symbols = {symbol: size for symbol, size in zip(program.signature.dimensions, (3, 7), strict=True)}
    found = [item for move in plan.moves for item in traffic(plan, move, symbols)]
    hidden, logits = 3 * 7 * 32 * 4, 3 * 7 * 61 * 4
    assert [item.kind for item in found] == ["all-reduce"] * 5 + ["all-gather"]
    assert [item.payload_bytes for item in found] == [hidden] * 5 + [logits]
    assert [item.sent_bytes for item in found] == [2 * hidden * 3 / 4] * 5 + [logits * 3 / 4]
    assert [item.messages for item in found] == [6] * 5 + [3]
    assert LINK.seconds(2000, 6) == pytest.approx(6e-5 + 2e-6)


def test_ranges_of_rounded_values_are_counted() -> None:
    program, samples = program_of("llama")
    quantized, _ = run_passes("quantize{scheme=int8-dynamic},fold-quantized-weights", program, samples)
    symbols = {symbol: 2 for symbol in program.signature.dimensions}
    found = joint_traffic(make_plan(quantized, 2), symbols)
    # What the output projection and the down projection of both layers read: two numbers a token.
    assert [item.payload_bytes for _, item in found] == [2 * 4 * 4] * 4


def test_sizes_are_checked() -> None:
    program, _ = program_of("llama")
    with pytest.raises(UnsupportedError, match="has no dimension 'token'"):
        sharding_table(program, make_plan(program, 2), {"token": 3}, LINK)
