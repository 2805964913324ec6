"""Say in one sentence which table a call's inputs lead out of: a token id past the vocabulary, a position past the last."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import torch
from torch import fx

from lissom.compiler import node as nodes
from lissom.compiler.program import Program

aten = torch.ops.aten


def outside_table(program: Program, inputs: Sequence[torch.Tensor]) -> str | None:
    """The sentence for the first lookup that asks for a row its table does not have; None when all are inside.

    The program is run once more, so this is for a call that has failed already. On CUDA such a call cannot be explained:
    it leaves the device in an error state.
    """
    indices: dict[object, torch.Tensor] = dict(zip(program.placeholders, inputs, strict=True))

    def observe(node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor) and not value.is_floating_point():
            indices[node] = value

    with suppress(IndexError, RuntimeError):
        program.run(inputs, observe)
    for node in program.nodes():
        found = _look_up(node)
        if found is None:
            continue
        asked, rows = indices.get(found[0]), found[1]
        if asked is None or asked.numel() == 0 or not isinstance(rows, int):
            continue
        low, high = int(asked.min()), int(asked.max())
        if low < 0 or high >= rows:
            return (
                f"the inputs ask for row {high if high >= rows else low} of '{_name(node.args[0])}', which has rows 0 to "
                f"{rows - 1}; pass token ids inside the vocabulary, and no more tokens than the model has positions"
            )
    return None


def _look_up(node: fx.Node) -> tuple[object, object] | None:
    """The indices a call looks up and how many rows its table has; None when it is no look-up."""
    if str(node.target) == "lissom.packed_embedding.default":
        return node.args[1], node.kwargs["features"]
    if node.target is aten.embedding.default:
        return node.args[1], nodes.tensor_type(node.args[0]).shape[0]
    if node.target in (aten.index_select.default, aten.gather.default):
        return node.args[2], nodes.tensor_type(node.args[0]).shape[cast(int, node.args[1])]
    return None


def _name(table: object) -> str:
    assert isinstance(table, fx.Node)
    return str(table.target) if table.op == "get_attr" else table.name
