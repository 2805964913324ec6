"""Tests of lissom.compiler.ir.samples."""

import torch
from torch import nn

from lissom.compiler.ir.samples import LARGE_WORK, check_samples, few_rows, more_samples, spread, varied_samples
from lissom.frontends.capture.export import capture
from tests.support.models import CASES, capture_of, normal, seeded, tokens


def test_checks_run_on_example_and_masked_variant():
    found = capture_of("bert")
    first, second = check_samples(found.program.signature, found.example)
    assert [tensor.shape for tensor in first] == [(2, 5), (2, 5)]
    assert [tensor.shape for tensor in second] == [(3, 7), (3, 7)]
    assert first[1].all()
    assert not second[1].all()


def test_a_variant_meets_the_conditions_of_the_model():
    found = capture_of("blocked")
    _, second = check_samples(found.program.signature, found.example)
    assert second[0].shape == (4, 16, 8)


def test_a_variant_stays_under_the_maximum():
    found = capture_of("bert")
    example = [tokens(2, 32), torch.ones(2, 32, dtype=torch.long)]
    _, second = check_samples(found.program.signature, example)
    assert second[0].shape == (1, 16)


def test_samples_are_spread_over_the_data() -> None:
    data = [[torch.zeros(64, 64)] for _ in range(10)]
    assert [item is found for item, found in zip(data[::5], spread(data, 8192), strict=True)] == [True, True]
    assert len(spread(data[:1], 8192)) == 1
    assert len(spread([[torch.zeros(2, 3)]] * 4, 8192)) == 4
    assert spread([], 8192) == []


def test_every_padding_form_is_tried_in_both_polarities() -> None:
    for usual in (1, 0):
        found = [mask for _, mask in varied_samples([normal(2, 6, 8), torch.full((2, 6), usual)])[1:]]
        places = [(mask != usual).tolist() for mask in found]
        end, start = [[False] * 6, [False] * 4 + [True] * 2], [[True, True, False, False, False, False], [False] * 6]
        assert end in places and start in places and [[True] * 6, [False] * 6] in places


def test_an_example_of_much_work_is_checked_on_some_of_its_rows() -> None:
    found = capture_of("bert")
    signature, example = found.program.signature, [tokens(8, 5), torch.ones(8, 5, dtype=torch.long)]
    rows = [len(few_rows(signature, example, int(work * LARGE_WORK))[0]) for work in (1, 2, 4, 1000)]
    assert rows == [8, 4, 2, 1]
    first, *_, last = few_rows(signature, example, int(2 * LARGE_WORK))[0]
    assert torch.equal(first, example[0][0]) and torch.equal(last, example[0][-1])


def test_rows_that_a_model_fixes_or_binds_all_stay() -> None:
    case = CASES["bert"]()
    fixed = capture(case.model, case.args, case.kwargs, dynamic=False)
    assert [len(tensor) for tensor in few_rows(fixed.program.signature, fixed.example, 1 << 60)] == [2, 2]
    bound = capture_of("blocked")
    sample = few_rows(bound.program.signature, bound.example, 1 << 60)
    bound.program.signature.check_sizes(sample)


def test_many_rows_are_no_longer_text() -> None:
    found = capture_of("convolution")
    signature = found.program.signature
    assert signature.lengths == [signature.batch]
    much = more_samples(signature, found.example, int(LARGE_WORK))
    assert all(len(sample[0]) < 4 * len(found.example[0]) for sample in much)
    assert any(len(sample[0]) == 4 * len(found.example[0]) for sample in more_samples(signature, found.example, 1))


def test_some_rows_of_much_work_leave_room_for_long_text() -> None:
    """The work of a row, which limits the longest text, is that of the rows that are left, and not of all."""
    signature = capture(seeded(lambda: nn.Linear(8, 8)), (normal(2, 5, 8),)).program.signature
    flops = int(50 * LARGE_WORK)
    sample = few_rows(signature, [normal(16384, 5, 8)], flops)
    assert len(sample[0]) == 327
    lengths = [inputs[0].shape[1] for inputs in more_samples(signature, sample, min(flops, LARGE_WORK))]
    assert max(lengths) == 163
    assert max(inputs[0].shape[1] for inputs in more_samples(signature, sample, flops)) == 20
