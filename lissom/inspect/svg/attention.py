"""The attention pattern of a layer as an SVG picture: which blocks of keys each block of queries sees."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import fx

from lissom.compiler.analysis.patterns.reader import read_pattern
from lissom.compiler.analysis.structure.linear import is_attention
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import BlockSparseAttention
from lissom.compiler.ir.printer import place
from lissom.compiler.ir.program import Program
from lissom.errors import UnsupportedError, nearest
from lissom.inspect.folding import ranges
from lissom.inspect.svg.canvas import LABEL_WIDTH, Canvas
from lissom.ops import block_sparse_attention
from lissom.ops.pattern import Pattern

TOKENS = 1024
_SIDE = 256.0
_MARGIN = 16.0
_LEFT = 56.0
_ABOVE = 74.0
_BESIDE = 40.0
_MOST_BLOCKS = 64
_KINDS = ("unseen", "partly", "seen")


def attention_svg(program: Program, only: str = "", tokens: int = TOKENS) -> str:
    """The picture of the attentions in a module: a square for each pattern, with the heads that have it.

    Args:
        only: the path of a module or a layer; all attentions by default, equal ones once.
        tokens: of queries and of keys.

    Raises:
        UnsupportedError: if there is no attention in it, none with a pattern of positions, or no token.

    Examples:
        >>> import torch, lissom
        >>> from lissom.inspect.svg.attention import attention_svg
        >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
        >>> passes = "sparsify-attention{pattern=window,window=64}"
        >>> program = lissom.optimize(model, torch.randn(1, 256, 32), passes=passes, checks="structural").program
        >>> "of the blocks are seen" in attention_svg(program, tokens=256)
        True
    """
    if tokens < 1:
        raise UnsupportedError(f"a pattern of {tokens} tokens cannot be drawn; give 1 token or more")
    attentions = [node for node in program.nodes() if is_attention(node) or nodes.is_call(node, block_sparse_attention)]
    paths = {nodes.origin(node).module_path: None for node in attentions}
    chosen = [node for node in attentions if _is_in(nodes.origin(node).module_path, only)]
    if not chosen:
        raise UnsupportedError(f"{program.name} has no attention in '{only}'{nearest(only, paths) or ';'} {_some([*paths])}")
    squares: dict[tuple[object, ...], tuple[torch.Tensor, int, list[str]]] = {}
    reasons: list[str] = []
    for node in chosen:
        pattern, layout, reason = _pattern(program, node)
        if pattern is None:
            reasons.append(
                f"{place(program, node)}: {reason or 'its mask does not depend on positions, so every key is visible'}"
            )
            continue
        block = max(pattern.block if layout is not None else 64, -(-tokens // _MOST_BLOCKS))
        some, whole = pattern.blocks(tokens, tokens, block, layout)
        shades = some.int() + whole.int()
        for heads, square in _by_head(shades):
            key = block, tuple(square.flatten().tolist())
            path = nodes.origin(node).module_path or node.name
            squares.setdefault(key, (square, block, []))[2].append(f"{path}{heads}")
    if not squares:
        raise UnsupportedError(f"no attention in '{only or program.name}' has a pattern of positions: {reasons[0]}")
    return _draw(f"{program.name} {only}".strip(), tokens, list(squares.values()), len(reasons))


def _is_in(path: str, only: str) -> bool:
    return not only or path == only or path.startswith(f"{only}.")


def _some(paths: Sequence[str]) -> str:
    return f"its attentions are in {', '.join(paths[:3])}{', …' if len(paths) > 3 else ''}" if paths else "it has none at all"


def _pattern(program: Program, node: fx.Node) -> tuple[Pattern | None, torch.Tensor | None, str | None]:
    """The pattern of an attention and its layout, or why it has none."""
    sparse = BlockSparseAttention.of(node)
    if sparse is None:
        reading = read_pattern(program, node)
        return reading.pattern, reading.layout, reading.reason
    table = None if sparse.layout is None else program.constant(sparse.layout)
    if sparse.layout is not None and table is None:
        return None, None, "its layout of blocks is computed"
    return Pattern.decode(sparse.pattern, sparse.block), table, None


def _by_head(shades: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The distinct squares of the heads, each with its heads in words; no words where all heads have the same."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for head, square in enumerate(shades):
        groups.setdefault(tuple(square.flatten().tolist()), []).append(head)
    if len(groups) == 1:
        return [("", shades[0])]
    return [(f" head{'s' if len(heads) > 1 else ''} {ranges(heads)}", shades[heads[0]]) for heads in groups.values()]


def _draw(title: str, tokens: int, squares: Sequence[tuple[torch.Tensor, int, list[str]]], dense: int) -> str:
    canvas = Canvas()
    columns = min(len(squares), 4)
    each = max(_SIDE, *(LABEL_WIDTH * len(_caption(names)) for _, _, names in squares))
    width = max(2 * _MARGIN + columns * (_LEFT + each + _BESIDE), 560.0)
    canvas.text(_MARGIN, 24, f"{title}: which keys each query sees", "strong title")
    without = f"; {dense} attention{'s' if dense > 1 else ''} without a pattern not drawn" if dense else ""
    canvas.text(_MARGIN, 42, f"{tokens:,} tokens; dark: all pairs of a block, pale: some{without}", "quiet")
    for index, (square, block, names) in enumerate(squares):
        x = _MARGIN + _LEFT + (index % columns) * (_LEFT + each + _BESIDE)
        y = 42 + _ABOVE + (index // columns) * (_SIDE + _ABOVE + 28)
        canvas.text(x, y - 44, _caption(names), "strong")
        share = f"{100 * float((square > 0).float().mean()):.3g} % of the blocks are seen"
        canvas.text(x, y - 28, f"{share}, {block} × {block} tokens each", "quiet")
        _square(canvas, square, x, y, tokens)
    rows = -(-len(squares) // columns)
    return canvas.svg(width, 42 + rows * (_SIDE + _ABOVE + 28) + _MARGIN, title)


def _caption(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _square(canvas: Canvas, square: torch.Tensor, x: float, y: float, tokens: int) -> None:
    """One pattern: rows are blocks of queries, columns blocks of keys; equal neighbors in a row are one rectangle."""
    rows, columns = square.shape
    height, width = _SIDE / rows, _SIDE / columns
    canvas.rect(x, y, _SIDE, _SIDE, "unseen", radius=0)
    for row in range(rows):
        at = 0
        for shade, run in groupby(square[row].tolist()):
            count = len(list(run))
            if shade:
                canvas.rect(x + at * width, y + row * height, count * width, height, _KINDS[shade], radius=0)
            at += count
    canvas.text(x, y - 8, "keys 0", "quiet")
    canvas.text(x + _SIDE, y - 8, f"{tokens - 1:,}", "quiet", anchor="end")
    canvas.text(x - 8, y + 10, "queries 0", "quiet", anchor="end")
    canvas.text(x - 8, y + _SIDE, f"{tokens - 1:,}", "quiet", anchor="end")
