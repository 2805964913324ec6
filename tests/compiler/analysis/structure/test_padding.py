"""Tests of padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.analysis.structure.padding import hides, kept_rows, key_mask, padding_masks, zero_where_hidden
from tests.support.harness import Calls, capture_model
from tests.support.models import normal

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def attend(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    y = x[:, None]
    return functional.scaled_dot_product_attention(y, y, y, attn_mask=mask)[:, 0]


def causal(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return attend(x, torch.ones(x.shape[1], x.shape[1]).tril().bool() & (mask[:, None, None, :] != 0))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, mask: attend(x, mask[:, None, None, :] != 0), ["y"]),
        (lambda x, mask: attend(x, (1.0 - mask[:, None, None, :].float()) * -1e9), ["y"]),
        (causal, ["y"]),
        (lambda x, mask: attend(x, mask[:, None, None, :].float() * 0.5), []),
        (lambda x, mask: attend(x, mask[:, None, None, :] == 0), []),
        (lambda x, mask: attend(x, mask[:, None, :, None] != 0), []),
        (lambda x, mask: attend(x * mask[..., None], torch.ones(x.shape[1], x.shape[1]).bool()), []),
        (lambda x, mask: attend(x * mask[..., None], torch.eye(x.shape[1]).bool()), []),
        (lambda x, mask: attend(x, torch.eye(x.shape[1]).bool() & (mask[:, None, None, :] != 0)), ["y"]),
        (lambda x, mask: attend(x, mask[:, None, None, :] + torch.eye(x.shape[1]).log()), []),
    ],
    ids=[
        *("flags", "numbers", "causal", "a bias", "the other way round", "queries", "no mask"),
        *("each its own", "each its own real one", "each its own and a bias"),
    ],
)
def test_masks_are_found_by_what_they_hide(function: Callable, found: list[str]) -> None:
    program = capture_model(Calls(function), normal(2, 3, 4), MASK).program
    assert [node.name for node in padding_masks(program)] == found


def _places(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    places = torch.arange(x.shape[1])
    return places[:, None], places[None, :]


def _windowed(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    row, column = _places(x)
    return attend(x, (column <= row) & (column > row - 4) & (mask[:, None, None, :] != 0))


def _blocks(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    row, column = _places(x)
    return attend(x, (column <= row) & (column // 4 == row // 4))


def _prefix(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    row, column = _places(x)
    return attend(x, (column <= row) | (column < 2))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x, mask: attend(x, mask[:, None, None, :] != 0), "False y"),
        (lambda x, mask: attend(x, (1.0 - mask[:, None, None, :].float()) * -1e9), "False y"),
        (lambda x, mask: attend(x, (mask[:, None, None, :] != 0) & (mask[:, None, :, None] != 0)), "False y"),
        (causal, "True y"),
        (lambda x, mask: attend(x, torch.ones(x.shape[1], x.shape[1]).tril().bool()), "True None"),
        (lambda x, mask: attend(x, torch.ones(x.shape[1], x.shape[1]).triu(1) * -1e9), "True None"),
        (lambda x, mask: attend(x, torch.ones(x.shape[1], x.shape[1]).bool()), "False None"),
        (lambda x, mask: attend(x, torch.ones(x.shape[1], x.shape[1]).triu().bool()), None),
        (lambda x, mask: attend(x, mask[:, None, None, :].float() * 0.5), None),
        (lambda x, mask: attend(x, mask[:, None, None, :] == 0), None),
        (_windowed, None),
        (_blocks, None),
        (_prefix, None),
    ],
    ids=[
        *("flags", "numbers", "queries too", "causal and padding", "causal", "causal numbers", "all"),
        *("anti-causal", "a bias", "the other way round", "window", "blocks", "prefix"),
    ],
)
def test_mask_of_padding_and_causality_alone_is_recognized(function: Callable, found: str | None) -> None:
    program = capture_model(Calls(function), normal(2, 3, 4), MASK).program
    (attention,) = (node for node in program.nodes() if is_attention(node))
    told = key_mask(program, attention)
    assert (None if told is None else f"{told.causal} {told.padding}") == found


def test_a_row_without_tokens_is_kept_whole() -> None:
    assert kept_rows(torch.tensor([[1, 0], [0, 0]])).tolist() == [[True, False], [True, True]]


def test_hiding_is_asked_of_kept_queries_of_same_tokens() -> None:
    kept = torch.tensor([[True, False]])
    mask = torch.tensor([[[[True, False], [True, True]]]])
    assert hides(mask, kept, own=True)
    assert not hides(mask, kept, own=False)


def test_zeros_are_looked_for_where_nothing_is_kept() -> None:
    kept = torch.tensor([[True, False]])
    assert zero_where_hidden(torch.tensor([[[3.0], [0.0]]]), kept, (0, 1), 3)
    assert not zero_where_hidden(torch.tensor([[[0.0], [3.0]]]), kept, (0, 1), 3)
    assert not zero_where_hidden(torch.tensor(1.0), kept, (0, 1), 3)
