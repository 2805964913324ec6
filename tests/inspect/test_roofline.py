"""Tests of lissom.inspect.roofline: what the tables say."""

import pytest
import torch

from lissom.compiler.analysis.cost import cost
from lissom.errors import UnsupportedError
from lissom.frontends.capture.export import capture
from lissom.inspect.roofline import cost_table, machine_table
from lissom.inspect.tables import plain
from lissom.measure.roofline import node_seconds
from tests.measure.test_machine import ceilings, example
from tests.support.models import captured

MACHINE = example()
"""100 GFLOP/s in float32, 200 in bfloat16, no int8, 10 GB/s."""


def lines(table, label: str) -> list[str]:
    return [line.split() for line in plain(table, 140).splitlines() if line.strip().startswith(label)]


def test_a_row_has_the_numbers_of_a_site():
    """1,000 rows of 100 tokens: up and down of 8 x 12 are 38.4 MFLOP; norm and sum are no part of the feed-forward."""
    table = cost_table(captured("feed_forward"), {"batch": 1000, "sequence": 100}, None)
    rows = 100_000
    read, written = 4 * (rows * (8 + 12 + 12) + 212), 4 * rows * (12 + 12 + 8)
    ((*_, gflop, megabytes_read, megabytes_written, parameters, intensity, share),) = lines(table, "down feed-forward")
    assert (gflop, share) == ("0.038", "100.0")
    assert (megabytes_read, megabytes_written) == (f"{read / 1e6:.3g}", f"{written / 1e6:.3g}")
    assert (parameters, intensity) == ("<.001", f"{2 * 2 * rows * 96 / (read + written):.3g}")


def test_roof_of_site_is_the_sum_of_its_nodes():
    program, sizes = captured("bert"), {"batch": 64, "sequence": 32}
    table = cost_table(program, sizes, MACHINE)
    whole = sum(node_seconds(node, item, MACHINE) for node, item in cost(program, sizes).items())
    ((*_, milliseconds, share),) = lines(table, "whole program")
    assert (milliseconds, share) == (f"{whole * 1e3:.3g}", "100.0")
    parts = ("encoder.layer", "embedding", "norm", "LM head", "product", "other")
    rows = [row for part in parts for row in lines(table, part)]
    counts = [next((int(word[1:]) for word in row if word.startswith("×")), 1) for row in rows]
    assert sum(counts) > len(rows)
    shares = [count * float(row[-1]) for row, count in zip(rows, counts, strict=True)]
    assert sum(shares) == pytest.approx(100, abs=0.05 * sum(counts))


def test_sizes_not_given_are_those_of_the_example():
    assert plain(cost_table(captured("feed_forward"), {}, None)).splitlines()[0].strip() == "FeedForward, batch 2, sequence 5"
    assert "BertModel, batch 2, sequence 7" in plain(cost_table(captured("bert"), {"sequence": 7}, None))


def test_a_table_without_ceilings_says_how_to_get_them():
    shown = " ".join(plain(cost_table(captured("feed_forward"), {}, None)).split())
    assert "Run `lissom machine` once to see the roofline in milliseconds." in shown
    assert "roof" not in shown.partition("Every node")[0]


def test_a_dimension_the_program_does_not_have_is_refused():
    with pytest.raises(UnsupportedError, match="FeedForward has no dimension 'tokens'"):
        cost_table(captured("feed_forward"), {"tokens": 3}, None)


def test_value_dependent_sizes_are_reported_as_left_out():
    class Chosen(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[x[:, 0].nonzero().squeeze(1)] * 2

    program = capture(Chosen(), (torch.ones(5, 4),), dynamic=False).program
    shown = " ".join(plain(cost_table(program, {}, MACHINE)).split())
    assert "Chosen, all sizes fixed" in shown
    assert "Sizes that depend on the values of the inputs count as 0." in shown


def test_machines_table_has_every_ceiling_with_unit_and_spread():
    shown = [" ".join(line.split()) for line in plain(machine_table(example(devices=(ceilings("a card"),)))).splitlines()]
    assert shown[0] == "a processor: 4 cores, 2 threads, torch 2.11.0"
    assert shown.count("matrix products, fp32 100 90 to 110 GFLOP/s linear 2048³") == 2
    assert shown.count("matrix products, int8 none") == 2
    assert shown.count("memory bandwidth 10 9 to 11 GB/s copy 256 MiB") == 2
    assert "a card" in shown
    assert shown[-3:] == ["caches: L1d 32 KiB, L2 1024 KiB", "instructions: avx2 fma", "measured on 2026-01-31"]


def test_a_machine_that_tells_nothing_is_said_to():
    unknown = example(isa=(), l1d_bytes=None, l2_bytes=None, devices=())
    shown = plain(machine_table(unknown))
    assert "caches: unknown" in shown
    assert "instructions: unknown" in shown
