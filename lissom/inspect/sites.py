"""The structure, the axes and the sites of a program as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import fx

from lissom.compiler.analysis.amounts import AmountSite, legal_text
from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.axes.columns import feature_dim
from lissom.compiler.analysis.patterns.reader import read_pattern
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.feed_forward import FeedForwardSite
from lissom.compiler.analysis.structure.linear import input_of, is_linear, weight_of
from lissom.compiler.analysis.structure.transformer import Structure, structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.inspect.folding import Row, fold_rows
from lissom.inspect.tables import plain_table

_TOKENS = 4096
_BLOCK = 64
"""The text length and the block size, in tokens, for which sparse patterns are described."""


def structure_tables(program: Program) -> RenderableType:
    """Layers with their attention and feed-forward sites; then a sentence on norms, embeddings, heads and convolutions."""
    model_structure = program.fact(structure)
    table = plain_table(f"{program.name}: structure")
    for heading in ("layer", "attention", "mask and positions", "feed-forward"):
        table.add_column(heading, overflow="fold")
    rows = [
        (
            layer.path,
            "\n".join(map(_attention, layer.attention)),
            "\n".join(_mask(program, site) for site in layer.attention),
            "\n".join(map(_feed_forward, layer.feed_forward)),
        )
        for layer in model_structure.layers
    ]
    for row in fold_rows(rows):
        table.add_row(*map(Text, row))
    return Group(table, Text(f"\n{_rest(model_structure)}"))


def _attention(site: AttentionSite) -> str:
    heads = f"{site.heads} heads" if site.heads == site.key_value_heads else f"{site.heads}/{site.key_value_heads} heads"
    words = [heads, f"of {site.head_dim}", "packed q/k/v" if site.packed else "", "cross" if site.cross else ""]
    return " ".join(word for word in words if word)


def _mask(program: Program, site: AttentionSite) -> str:
    words = [f"mask {site.mask}", _pattern(program, site), "" if site.positions == "none here" else site.positions]
    words += [f"soft cap {site.softcap:g}" if site.softcap else "", "sinks" if site.sinks else ""]
    return ", ".join(word for word in words if word)


def _pattern(program: Program, site: AttentionSite) -> str:
    """The fraction of key blocks that a sparse mask leaves visible; empty for causal masks."""
    reading = read_pattern(program, site.node)
    if reading.pattern is None or reading.causal:
        return ""
    some, _ = reading.pattern.blocks(_TOKENS, _TOKENS, _BLOCK, reading.layout)
    return f"{100 * float(some.float().mean()):.0f} % of blocks at {_TOKENS:,} tokens"


def _feed_forward(site: FeedForwardSite) -> str:
    names = ", ".join(dict.fromkeys(str(node.target).split(".")[1] for node in site.activations))
    return f"{'gated ' if site.gated else ''}{names}, width {site.width}"


def _rest(model_structure: Structure) -> str:
    tables = ", ".join(f"{table.rows} x {table.width}{' (tied)' if table.tied else ''}" for table in model_structure.embeddings)
    parts = [
        f"{len(model_structure.attention)} attention and {len(model_structure.feed_forward)} feed-forward sites",
        f"{len(model_structure.norms)} norms",
        f"embeddings {tables}" if tables else "no embeddings",
        f"{len(model_structure.lm_heads)} LM head{'s' if len(model_structure.lm_heads) != 1 else ''}",
        f"{len(model_structure.convolutions)} convolutions" if model_structure.convolutions else "",
        f"{len(model_structure.mixtures)} mixtures of experts ({_experts(model_structure)})"
        if model_structure.mixtures
        else "",
    ]
    return "; ".join(part for part in parts if part)


def _experts(model_structure: Structure) -> str:
    return ", ".join(dict.fromkeys(f"{site.top_k} of {site.experts} per token" for site in model_structure.mixtures))


def axes_table(program: Program) -> Table:
    """Every axis that linear layers contract: its size, kind, number of occurrences, and whether it may be resized."""
    program_axes = program.fact(axes)
    table = plain_table(f"{program.name}: axes contracted by linear layers")
    for heading in ("size", "contracted by", "places", "weights", "may shrink"):
        table.add_column(heading, overflow="fold", justify="right" if heading in ("size", "places", "weights") else "left")
    # Reasons may be long sentences and may wrap; paths may not.
    table.columns[1].no_wrap = True
    rows: list[Row] = []
    for axis, readers in _contracted(program, program_axes).items():
        places = program_axes.occurrences(axis)
        weights = {place.node for place in places if place.node.op == "get_attr"}
        shrinks = f"no: {reason}" if (reason := program_axes.obstacle(axis)) else "yes"
        rows.append((str(axis.size), _paths(readers), str(len(places)), str(len(weights)), shrinks))
    for row in fold_rows(rows, label=1):
        table.add_row(*map(Text, row))
    return table


def _contracted(program: Program, program_axes: Axes) -> dict[Axis, list[fx.Node]]:
    """The axes that linear layers sum over, each with its layers."""
    readers: dict[Axis, list[fx.Node]] = {}
    for node in program.nodes():
        weight = weight_of(node) if is_linear(node) else None
        if weight is None or not nodes.is_tensor(node):
            continue
        for atom in dict.fromkeys(program_axes.axis(input_of(node), feature_dim(node)).atoms()):
            readers.setdefault(atom, []).append(node)
    return readers


def _paths(readers: Sequence[fx.Node]) -> str:
    first = nodes.origin(readers[0]).module_path or readers[0].name
    return first if len(readers) == 1 else f"{first} and {len(readers) - 1} more"


def amounts_table(program: Program, sites: Sequence[AmountSite]) -> RenderableType:
    """The sites for which passes take amounts, in a table for each kind: path, size, and each pass with its amounts."""
    parts: list[RenderableType] = []
    for kind in dict.fromkeys(site.kind for site in sites):
        table = plain_table()
        table.add_column(kind, no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("passes and amounts", overflow="fold")
        rows = [(site.path, f"{site.size:,}", _takes(site)) for site in sites if site.kind == kind]
        for row in fold_rows(rows):
            table.add_row(*map(Text, row))
        parts += [table, Text()]
    return Group(Text(f"{program.name}: sites and the amounts that passes take there\n"), *parts)


def _takes(site: AmountSite) -> str:
    lines = [f"{name}: {legal_text(legal)}" for name, legal in site.takes.items()]
    lines += [f"same weights: {', '.join(site.paths[1:])}"] if site.paths[1:] else []
    lines += [f"same axis: {', '.join(site.shares)}"] if site.shares else []
    return "\n".join(lines)
