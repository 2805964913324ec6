"""The layers that a linear map replaces best: those whose part the layers after them learn most easily.

Layers that follow each other are removed as one run. With x and y the residual stream of a token before and after a run, its
error is the part of y's variance that the best linear map of x leaves unexplained:

    error = E‖y - ŷ(x)‖² / E‖y - E y‖²,   ŷ(x) = A x + b

A and b are fitted on every other batch, by ridge regression, and the error is measured on the others. The sum of the errors of
all runs is least, where a run counts as its parts if theirs is less. Shopkhoev et al. 2025, ReplaceMe: Network Simplification
via Depth Pruning and Transformer Block Linearization, put such a map in place of one run. https://arxiv.org/abs/2505.02819
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import fx

from lissom.compiler.analysis.structure.branches import Branch, follow
from lissom.compiler.calibration.hessian import damped
from lissom.compiler.calibration.statistics import observe
from lissom.compiler.ir.editor import Editor

_ROWS = 1 << 14
"""The most tokens that are kept."""
_ELEMENTS = 1 << 28
"""The most elements of all hidden states that are kept: 1 GB."""
_DAMPING = 1e-3

Halves = tuple[torch.Tensor, torch.Tensor]
"""Hidden states to fit on and to measure on, [tokens, features] each."""


def most_linear(edit: Editor, units: Mapping[str, Sequence[Branch]], count: int) -> list[str]:
    """The names of `count` layers to remove.

    Args:
        units: the branches of each layer, in the order of the graph.
    """
    names, parts = list(units), list(units.values())
    together = [follow([before[-1], after[0]]) for before, after in pairwise(parts)]
    stream = _hidden_states(edit, parts)

    @cache
    def fit_from(start: int) -> Callable[[Halves], float]:
        return unexplained_by(stream[parts[start][0].before])

    @cache
    def error(start: int, stop: int) -> float:
        return fit_from(start)(stream[parts[stop - 1][-1].after])

    # The least error of each number of removed layers among the first ones, with those layers.
    least: list[dict[int, tuple[float, list[str]]]] = [{0: (0.0, [])}, *({} for _ in names)]

    def offer(place: int, candidate: tuple[float, list[str]]) -> None:
        known = least[place].get(len(candidate[1]))
        if known is None or candidate[0] < known[0]:
            least[place][len(candidate[1])] = candidate

    for start in range(len(names)):
        for removed, (summed, gone) in least[start].items():
            offer(start + 1, (summed, gone))
            for stop in range(start + 1, min(len(names), start + count - removed) + 1):
                if stop > start + 1 and not together[stop - 2]:
                    break
                offer(stop, (summed + error(start, stop), [*gone, *names[start:stop]]))
    return least[-1][count][1]


def unexplained_by(before: Halves) -> Callable[[Halves], float]:
    """Takes another hidden state: the part of its variance that the best linear map of `before` leaves unexplained."""
    x, seen_x = before
    mean_x = x.mean(0)
    # Factored once for all runs that begin here.
    factor = torch.linalg.cholesky(damped((x - mean_x).T @ (x - mean_x), _DAMPING))

    def unexplained(after: Halves) -> float:
        y, seen_y = after
        mean_y = y.mean(0)
        solved = torch.cholesky_solve(((x - mean_x).T @ (y - mean_y)).double(), factor)
        wanted = seen_y - mean_y
        missing = wanted - (seen_x - mean_x) @ solved.float()
        return float(missing.square().sum() / wanted.square().sum().clamp_min(1e-30))

    return unexplained


def _hidden_states(edit: Editor, parts: Sequence[Sequence[Branch]]) -> dict[fx.Node, Halves]:
    """The residual stream before and after each layer, of some real tokens of every batch, in float32."""
    chosen = list(dict.fromkeys(node for unit in parts for node in (unit[0].before, unit[-1].after)))
    kept: dict[fx.Node, list[torch.Tensor]] = {node: [] for node in chosen}

    def visit(node: fx.Node, rows: torch.Tensor) -> None:
        most = min(_ROWS, _ELEMENTS // (len(chosen) * rows.shape[-1]))
        share = max(2, most // len(edit.data))
        kept[node].append(rows[:: -(-len(rows) // share) or 1].float())

    observe(edit.program, edit.data, chosen, visit)
    if len(edit.data) == 1:
        return {node: (rows[::2], rows[1::2]) for node, (rows,) in kept.items()}
    return {node: (torch.cat(rows[::2]), torch.cat(rows[1::2])) for node, rows in kept.items()}
