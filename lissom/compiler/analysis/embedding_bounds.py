"""Explain an index out of range: a token id outside the vocabulary, or a position past the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import fx

from lissom.compiler.analysis.token_ids import SAME_IDS, id_inputs
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Embedding, PackedEmbedding
from lissom.compiler.ir.collectives import alone
from lissom.compiler.ir.placement import Placed
from lissom.compiler.ir.program import Program
from lissom.ops.packed_linear import packed_embedding

aten = torch.ops.aten


def outside_table(program: Program, inputs: Sequence[torch.Tensor]) -> str | None:
    """The message for the first lookup with an index out of range; None when there is none.

    The program is run once more, so this is for a call that has already failed. On CUDA such a call cannot be explained:
    it leaves the device in an error state.
    """
    if (message := _dropped(program, inputs)) is not None:
        return message
    indices: dict[object, torch.Tensor] = {}
    shapes: dict[object, torch.Size] = {name: weight.shape for name, weight in program.weights().items()}

    def observe(node: fx.Node, value: object) -> None:
        if isinstance(value, torch.Tensor):
            shapes[node] = value.shape
            if not value.is_floating_point():
                indices[node] = value

    for node, value in zip(program.placeholders, inputs, strict=True):
        observe(node, value)
    with alone(), suppress(IndexError, RuntimeError):
        program.run(inputs, observe)
    for node in program.nodes():
        asked, rows = _look_up(node, shapes) or (None, 0)
        if asked in indices and (message := _outside(indices[asked], _name(nodes.operand(node)), rows)):
            return message
    return None


def vocabulary_size(program: Program, name: str) -> int | None:
    """The number of token ids that an input may hold: the fewest rows of a table it is looked up in; None if there is none.

    Args:
        name: of the input, `input_ids`.
    """
    shapes: dict[object, torch.Size] = {weight: tensor.shape for weight, tensor in program.weights().items()}
    leaves = zip(program.signature.tensors, program.placeholders, strict=True)
    ids = {node for leaf, node in leaves if leaf.path == name}
    rows: list[int] = []
    for node in program.nodes():
        if node.target in SAME_IDS and nodes.operand(node) in ids:
            ids.add(node)
        elif (looked_up := _look_up(node, shapes)) is not None and looked_up[0] in ids:
            rows.append(looked_up[1])
    return min(rows, default=None)


def embedding_tables(program: Program) -> dict[str, torch.Tensor]:
    """The weights that embeddings look up rows of, by name; a table that is also an LM head is among them."""
    reads = (nodes.operand(node) for node in program.nodes(aten.embedding.default, packed_embedding))
    names = dict.fromkeys(str(read.target) for read in reads if read.op == "get_attr")
    return {name: program.weight(name) for name in names}


def _dropped(program: Program, inputs: Sequence[torch.Tensor]) -> str | None:
    """The message for a token id that `prune-vocabulary` dropped; None when there is none, or it is read as unknown."""
    vocabulary = program.vocabulary
    if vocabulary is None or vocabulary.unknown is not None or vocabulary.ids == "tokenizer":
        return None
    places = {node: place for place, node in enumerate(program.placeholders)}
    for node in id_inputs(program):
        ids = inputs[places[node]].cpu().long()
        known = ids[(ids >= 0) & (ids < vocabulary.size)]
        dropped = known[vocabulary.dropped[known]]
        if len(dropped):
            return (
                f"the inputs hold the token id {int(dropped[0])}, which prune-vocabulary dropped, and the model has no unknown "
                f"token to read it as; pass ids of program.vocabulary.kept, or keep more"
            )
    return None


def _outside(ids: torch.Tensor, table: str, rows: int) -> str | None:
    """The message for an index outside a table; None when all are inside."""
    low, high = (int(end) for end in torch.aminmax(ids)) if ids.numel() else (0, 0)
    if low >= 0 and high < rows:
        return None
    return (
        f"the inputs ask for row {high if high >= rows else low} of '{table}', which has rows 0 to {rows - 1}; pass token ids "
        f"inside the vocabulary, and no more tokens than the model has positions"
    )


@dataclass(frozen=True)
class ShardedTable:
    """An embedding table sharded by rows.

    Attributes:
        argument: the position of the input with its indices.
        rows: of the whole table.
    """

    argument: int
    name: str
    rows: int

    def outside(self, inputs: Sequence[torch.Tensor]) -> str | None:
        """The message for an index outside the whole table; None when all are inside."""
        return _outside(inputs[self.argument], self.name, self.rows)


def sharded_tables(program: Program) -> tuple[ShardedTable, ...]:
    """The tables of one rank's program that are sharded by rows; they return zeros for rows that no rank holds."""
    tables = dict[tuple[int, int], ShardedTable]()
    places = {node: index for index, node in enumerate(program.placeholders)}
    for node in program.nodes(aten.embedding.default):
        table, held = Embedding(node).table, Embedding(node).ids
        placed = nodes.placed(table)
        spans = placed.spans(0) if isinstance(placed, Placed) else ()
        if not spans or not isinstance(spans[0].size, int):
            continue
        # The ids before a rank clamps them to its own rows.
        while held.target in (aten.clamp.default, aten.sub.Tensor):
            held = nodes.operand(held)
        if held in places:
            rows = spans[0].size
            tables.setdefault((places[held], rows), ShardedTable(places[held], _name(table), rows))
    return tuple(tables.values())


def _look_up(node: fx.Node, shapes: Mapping[object, torch.Size]) -> tuple[object, int] | None:
    """The indices a call looks up and the number of rows of its table; None for no lookup, or an unknown table.

    Args:
        shapes: of the actual tensors, by weight name and by node: the types of a loaded program may differ.
    """
    if (packed := PackedEmbedding.of(node)) is not None:
        return packed.ids, packed.features
    if (lookup := Embedding.of(node)) is not None:
        dim, ids = 0, lookup.ids
    elif nodes.is_call(node, aten.index_select.default, aten.gather.default):
        dim, ids = nodes.argument(node, "dim"), nodes.argument(node, "index")
        assert isinstance(dim, int)
    else:
        return None
    table = nodes.operand(node)
    shape = shapes.get(str(table.target) if table.op == "get_attr" else table, ())
    return (ids, shape[dim]) if -len(shape) <= dim < len(shape) else None


def _name(table: fx.Node) -> str:
    return str(table.target) if table.op == "get_attr" else table.name
