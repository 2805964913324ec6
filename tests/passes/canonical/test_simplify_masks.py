"""Tests of simplify-masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lissom.backends.base import Backend
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.frontends.generation.decoder import capture_decoder
from lissom.passes import RECIPES, known_passes
from lissom.passes.canonical.simplify_masks import SimplifyMasks
from tests.support import captures
from tests.support.decoders import decoder
from tests.support.harness import Calls, TextCase, aten, calls, check_golden, every_backend, rewrite, text_cases
from tests.support.models import normal, tiny_bert

pytestmark = pytest.mark.usefixtures("shared_captures")
Function = Callable[..., torch.Tensor]

PASSES = "remove-no-ops,simplify-masks"


def indexed(x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """A mask as functions of positions make it: the caller's at each row and key, where the query's position counts."""
    rows, length = seen.shape
    batch, queries, keys = torch.arange(rows), torch.arange(length), torch.arange(length)
    kept = seen[batch[:, None, None, None], keys[None, None, None, :]]
    mask = queries.new_ones((), dtype=torch.bool) & (queries[None, None, :, None] >= 0) & kept
    return x.masked_fill(~mask, 0.0)


def scaled(mask: Function) -> Function:
    """x [2, 1, 5, 5] times a mask made of `seen` [2, 5], whatever its shape."""
    return lambda x, seen: x.sum() * mask(seen, torch.arange(2), torch.arange(5))


INDEXED: dict[str, Function] = {
    "a mask of positions": indexed,
    "all of a matrix": scaled(lambda seen, rows, columns: seen[rows[:, None], columns]),
    "sizes of one between": scaled(lambda seen, rows, columns: seen[rows[:, None, None], columns[None, None]]),
}


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return normal(2, 1, 5, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("name", INDEXED)
def test_indexing_by_every_position_is_a_view(name: str) -> None:
    module = Calls(INDEXED[name])
    program, _ = rewrite(PASSES, module, *inputs(), dynamic=False)
    assert calls(program, aten.index.Tensor, aten.arange.default, aten.__and__.Tensor, aten.ge.Scalar) == 0
    assert torch.equal(program(*inputs()), module(*inputs()))  # pyright: ignore[reportArgumentType]


def indexed_by(rows: torch.Tensor, columns: torch.Tensor) -> Calls:
    """Indexing by buffers, as constants are once they are folded."""
    return Calls(lambda self, seen: seen[self.rows, self.columns].to(torch.int32), rows=rows, columns=columns)


ROWS, COLUMNS, ONE = torch.arange(2)[:, None], torch.arange(5), torch.zeros(1, 1, dtype=torch.int64)
COUNTED = {
    "rows and columns": (ROWS, COLUMNS),
    "sizes of one between": (ROWS[:, None, None], COLUMNS[None, None]),
    "of 32 bits": (ROWS.int(), COLUMNS.int()),
    "one row": (ONE[None, None], COLUMNS.view(1, 1, 1, 5)),
    "one row on a line": (ONE, COLUMNS[None]),
    "one column": (COLUMNS[:, None], ONE),
}
NOT_COUNTED = {
    "shifted": (ROWS, (COLUMNS + 1) % 5),
    "backwards": (ROWS, COLUMNS.flip(0)),
    "a part": (ROWS, COLUMNS[:3]),
    "turned": (ROWS.T, COLUMNS[:, None]),
    "from the end": (ROWS, COLUMNS - 5),
    "a row of two": (ONE, COLUMNS),
    "one row that is dropped": (ONE[0], COLUMNS),
    "one column that is dropped": (COLUMNS, ONE[0]),
}


def matrix(name: str) -> torch.Tensor:
    """[2, 5], or one row or column of it."""
    whole = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    return whole[1:] if name.startswith("one row") else whole[1:].T.contiguous() if name.startswith("one column") else whole


@pytest.mark.parametrize("name", COUNTED)
def test_a_weight_that_counts_is_a_count(name: str) -> None:
    module, x = indexed_by(*COUNTED[name]), matrix(name)
    program, history = rewrite(SimplifyMasks(), module, x, dynamic=False)
    assert history.steps[-1].rewritten == 1 and calls(program, aten.index.Tensor) == 0
    assert torch.equal(program(x), module(x))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_leaves_other_weights_alone(name: str) -> None:
    module, x = indexed_by(*NOT_COUNTED[name]), matrix(name)
    _, history = rewrite(SimplifyMasks(), module, x, dynamic=False)
    assert history.steps[-1].rewritten == 0


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_decoder_reads_its_mask_as_it_is(batch: int) -> None:
    captured = capture_decoder(decoder("gemma3"), max_length=32, batch=batch)
    program, _ = Pipeline(parse_pipeline("exact", known_passes(), RECIPES), samples=captured.samples).run(captured.program)
    assert calls(program, aten.index.Tensor, aten.new_ones.default, aten.ge.Scalar) == 0


def test_what_the_caller_is_given_stays_a_copy() -> None:
    module = Calls(lambda x: x[torch.arange(2)[:, None], torch.arange(5)])
    program, _ = rewrite(SimplifyMasks(), module, normal(2, 5), dynamic=False)
    x = normal(2, 5)
    found = program(x)
    assert isinstance(found, torch.Tensor)
    found.zero_()
    assert torch.equal(x, normal(2, 5))


def test_rewrites() -> None:
    _, history = rewrite(PASSES, Calls(indexed), *inputs())
    check_golden("simplify_masks", history.diff(1, 2))


@every_backend
def test_a_bert_reads_its_mask_as_it_is(backend: Backend) -> None:
    case = tiny_bert()
    compiled = captures.compile(case.model, case.inputs, backend=backend)
    step = next(item for item in compiled.report.history.steps if item.spelling == "simplify-masks")
    assert step.rewritten >= 2
    assert (
        calls(captures.optimize(case.model, case.inputs).program, aten.index.Tensor, aten.ge.Scalar, aten.new_ones.default) == 0
    )


@text_cases("simplify_masks")
def test_text_cases(text_case: TextCase) -> None:
    text_case.check()
