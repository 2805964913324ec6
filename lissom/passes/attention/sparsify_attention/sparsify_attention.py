"""Restrict attention to a sparse pattern of visible keys, by adding the pattern to attention masks.

    mask(i, j)  ->  mask(i, j) ∧ pattern(i, j)

The result is dense attention with a mask of ordinary operators; `lower-sparse-attention` turns it into a kernel that skips
hidden blocks. Causal attention stays causal, and padding stays hidden. B is `block`. The patterns:

- `window`: |i - j| ≤ `window`. Beltagy et al. 2020, Longformer, §3.1. https://arxiv.org/abs/2004.05150
- `block`: ⌊i/B⌋ = ⌊j/B⌋, attention within blocks. Qiu et al. 2019, Blockwise Self-Attention. https://arxiv.org/abs/1911.02972
- `global-window-random`: the window, `global_tokens` first tokens that see all and are seen by all, and for each block of
  queries `random_blocks` blocks of keys, drawn for each head. Zaheer et al. 2020, Big Bird, §2. https://arxiv.org/abs/2007.14062
  Random blocks are a table of all pairs of blocks, at most 16 MiB per attention; positions past the table have none.
- `strided`: the window, and every `stride`-th block: (⌊i/B⌋ - ⌊j/B⌋) mod stride = 0. Child et al. 2019, Sparse Transformer,
  §4.3, https://arxiv.org/abs/1904.10509, use strides in tokens; with blocks, kernels can skip whole blocks.
- `dilated`: a window with gaps, ⌊window/B⌋ blocks to each side, `dilation` blocks apart. Longformer §3.1, with blocks in place
  of tokens.
- `measured`: for each head, the fewest blocks of keys with which each block of queries keeps the fraction `mass` of its
  attention on the calibration data. The mass of a pair of blocks is averaged over the texts that have both, and every text
  length keeps the fraction, so that short texts do not hide what long ones need. Blocks that no text reaches are kept, so the
  data should include long texts. The kept blocks are a weight of the program. The query's own block is always kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from torch import fx

from lissom.compiler.analysis.amounts import UNCHANGED, Amounts, AmountSite, amounts_text, fraction_of, site_names
from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.patterns.reader import CAUSAL
from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.operands import is_causal, mask_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import ATTENTIONS
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops.pattern import LAYOUT, Condition, Pattern
from lissom.passes.attention.sparsify_attention.attention_mass import BlockMass, block_masses, fewest_blocks
from lissom.passes.attention.sparsify_attention.mask_writer import write_pattern

aten = torch.ops.aten

_OPTIONS: Mapping[str, Mapping[str, float]] = {
    "window": {"window": 128, "global_tokens": 0},
    "block": {"block": 64, "global_tokens": 0},
    "global-window-random": {"window": 192, "block": 64, "global_tokens": 64, "random_blocks": 3, "seed": 0},
    "strided": {"window": 64, "block": 64, "stride": 8},
    "dilated": {"window": 128, "block": 64, "dilation": 2},
    "measured": {"mass": 0.95, "block": 32},
}
"""The options of each pattern, with their defaults."""
_MAIN = {"block": "block", "measured": "mass"}
"""The option that `patterns` gives a number; `window` for the other patterns."""
_DRAWN = 8192
"""Number of tokens with random blocks where the program has no maximum length; later tokens have none."""
_LARGEST_LAYOUT = 2**24
"""Most bytes of one attention's table of random blocks: 724² blocks per head of 32, about 46,000 tokens in blocks of 64."""


@dataclass(frozen=True)
class SparsifyAttention(Approximation):
    """Restricts attention to a sparse pattern of visible keys.

    Attributes:
        pattern: the visible keys of a query; see above.
        patterns: patterns of single attentions by module path, with `*` and `?`, each with its window, for `block` its block,
            for `measured` its mass if another than below; `none` leaves an attention dense:
            `"*=none,*.0=window:64,*.1=block:32"`. Attentions that it does not name get `pattern`.
        window: visible tokens to each side; default 128, `global-window-random` 192, `strided` 64.
        block: tokens per block; default 64, `measured` 32.
        global_tokens: number of first tokens that see all and are seen by all; default 0, `global-window-random` 64.
        random_blocks: random key blocks per query block; default 3.
        stride: every stride-th block is visible; default 8.
        dilation: distance of visible blocks in a dilated window; default 2.
        seed: of the random blocks; default 0.
        mass: fraction of the attention weights that `measured` keeps, above 0 and below 1; default 0.95.
        skip: module paths whose attention stays dense, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths whose attention becomes sparse, in the same form; others stay dense.
    """

    pattern: Literal["window", "block", "global-window-random", "strided", "dilated", "measured"] = "window"
    window: int | None = None
    block: int | None = None
    global_tokens: int | None = None
    random_blocks: int | None = None
    stride: int | None = None
    dilation: int | None = None
    seed: int | None = None
    mass: float | None = None
    skip: str = ""
    only: str = ""
    patterns: str = ""

    def __post_init__(self) -> None:
        named = [amount.partition(":")[0] for _, amount in self._patterns().entries if amount != UNCHANGED]
        allowed = {option: None for pattern in (self.pattern, *named) for option in _OPTIONS[pattern]}
        given = {name: getattr(self, name) for name in _least() if getattr(self, name) is not None}
        foreign = [name for name in given if name not in allowed]
        if foreign:
            raise UnsupportedError(
                f"sparsify-attention{{pattern={self.pattern}}} has no use for {foreign[0]}=; its options: {', '.join(allowed)}"
            )
        for name, value in given.items():
            if value < _least()[name] or (name == "mass" and not 0 < value < 1):
                wanted = "a fraction above 0 and below 1" if name == "mass" else f"{_least()[name]} or more"
                raise UnsupportedError(f"sparsify-attention takes {name}= of {wanted}, not {value:g}")

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        edit, attention = Editor(program, cls.name()), program.fact(structure).attention
        treated = [_obstacle(edit, site.node, site.cross) is None for site in attention]
        return [site for site, fits in zip(_sites(attention), treated, strict=True) if fits]

    def run(self, edit: Editor) -> None:
        attention = edit.program.fact(structure).attention
        sites = {site.node: site for site in attention}
        names = _sites(attention)
        given = dict(zip(sites, self._patterns().at(names, "attentions"), strict=True))

        def obstacle(node: fx.Node) -> str | None:
            by_name = "patterns= leaves it dense" if given[node] == UNCHANGED else None
            by_name = by_name or obstacle_by_name(node, skip=self.skip, only=self.only)
            return by_name or _obstacle(edit, node, sites[node].cross)

        chosen = {node: given[node] for node in edit.treatable(obstacle, *ATTENTIONS)}
        for amount in dict.fromkeys(chosen.values()):
            self._with(amount)._restrict(
                edit,
                {node: (sites[node], order) for order, (node, own) in enumerate(chosen.items()) if own == amount},
            )
        if chosen:
            text = amounts_text(names, [chosen[node] or self.pattern if node in chosen else None for node in sites])
            edit.per_site = format_pass(replace(self, patterns=f"*={UNCHANGED},{text}", skip="", only=""))

    def _patterns(self) -> Amounts:
        takes = f"{', '.join(_OPTIONS)}, each alone or with a number as in window:64, or none"
        return Amounts.parse(self.patterns, "sparsify-attention{patterns=}", _is_pattern, takes)

    def _with(self, amount: str | None) -> SparsifyAttention:
        """The pass with the pattern of an amount, and the options that this pattern has."""
        if amount is None and not self.patterns:
            return self
        pattern, _, number = (amount or self.pattern).partition(":")
        options: dict[str, Any] = {name: getattr(self, name) if name in _OPTIONS[pattern] else None for name in _least()}
        if number:
            main = _MAIN.get(pattern, "window")
            options[main] = float(number) if main == "mass" else int(number)
        return replace(self, pattern=pattern, patterns="", **options)

    def _restrict(self, edit: Editor, chosen: Mapping[fx.Node, tuple[AttentionSite, int]]) -> None:
        """Restrict attentions to the pattern of this pass.

        Args:
            chosen: each with its site and its number in the program.
        """
        if self.pattern == "measured":
            if not edit.data:
                raise RequirementError(
                    "sparsify-attention{pattern=measured} needs calibration data: pass data=, or choose another pattern="
                )
            self._measure(edit, [*chosen])
            return
        known: dict[object, fx.Node] = {}
        for node, (site, order) in chosen.items():
            pattern, layout = self._pattern(edit, site, order)
            key = (mask_of(node), is_causal(node), _tokens(node)) if layout is None else node
            if key not in known:
                with edit.before(node):
                    known[key] = _masked(edit, node, pattern, layout)
            _exchange(edit, node, known[key])

    def _value(self, name: str) -> int:
        given = getattr(self, name)
        return int(_OPTIONS[self.pattern][name] if given is None else given)

    def _pattern(self, edit: Editor, site: AttentionSite, order: int) -> tuple[Pattern, torch.Tensor | None]:
        """The pattern, and its layout of blocks where it has one."""
        options = _OPTIONS[self.pattern]
        block = self._value("block") if "block" in options else 64
        window = self._value("window") if "window" in options else 0
        near = Condition(1, -1, -window, window)
        tokens = self._value("global_tokens") if "global_tokens" in options else 0
        everywhere = [(Condition(1, 0, high=tokens - 1),), (Condition(0, 1, high=tokens - 1),)] if tokens else []
        if self.pattern == "window":
            return Pattern(((near,), *everywhere)), None
        if self.pattern == "block":
            return Pattern(((Condition(1, -1, 0, 0, block),), *everywhere)), None
        if self.pattern == "strided":
            return Pattern(((near,), (Condition(1, -1, 0, 0, block, self._value("stride")),))), None
        if self.pattern == "dilated":
            step = self._value("dilation")
            reach = window // block * step
            return Pattern(((Condition(1, -1, -reach, reach, block), Condition(1, -1, 0, 0, block, step)),)), None
        layout = self._draw(edit, site, order, block)
        return Pattern(((near,), (LAYOUT,), *everywhere), block), layout

    def _draw(self, edit: Editor, site: AttentionSite, order: int, block: int) -> torch.Tensor:
        """Random blocks of keys for each head and block of queries; only earlier ones for causal attention."""
        generator = torch.Generator().manual_seed(self._value("seed") + (order << 16))
        heads = nodes.fixed_size(Attention(site.node).q, 1)
        blocks = _drawn_blocks(edit, site.node, heads, block)
        return random_layout(heads, blocks, self._value("random_blocks"), causal=site.mask.causal, generator=generator)

    def _measure(self, edit: Editor, chosen: list[fx.Node]) -> None:
        block, share = self._value("block"), self.mass or _OPTIONS["measured"]["mass"]
        masses = block_masses(edit.program, edit.data, chosen, block, partial(edit.report, "samples"))
        for node in chosen:
            kept = fewest_blocks(masses[node].mean, share)
            layout = with_room(kept | (masses[node].count == 0))
            path = nodes.origin(node).module_path or node.name
            with edit.before(node):
                mask = _masked(edit, node, Pattern(((LAYOUT,),), block), layout.to(nodes.tensor_type(node).device))
            _exchange(edit, node, mask)
            edit.note(f"{path}: {_account(masses[node], kept)}")


def _least() -> dict[str, float]:
    """The numeric options, with the least value of each."""
    return {
        "window": 0, "block": 1, "global_tokens": 0, "random_blocks": 1, "stride": 1, "dilation": 1, "seed": 0, "mass": 0,
    }  # fmt: skip


def _is_pattern(amount: str) -> bool:
    """True for a pattern alone, and with a number."""
    pattern, colon, number = amount.partition(":")
    fits = number.isdecimal() if pattern != "measured" else fraction_of(number) is not None
    return pattern in _OPTIONS and (fits or not colon)


def _sites(attention: Sequence[AttentionSite]) -> list[AmountSite]:
    """The attentions as amounts name them."""
    names = site_names([site.path for site in attention], [site.node.name for site in attention])
    takes = {SparsifyAttention.name(): (UNCHANGED, *_OPTIONS)}
    return [AmountSite("attention", (name,), site.heads, takes) for name, site in zip(names, attention, strict=True)]


def _obstacle(edit: Editor, node: fx.Node, cross: bool) -> str | None:
    """The reason an attention stays dense; None if it can become sparse."""
    q, k = (nodes.tensor_type(operand) for operand in (Attention(node).q, Attention(node).k))
    if q.rank != 4 or k.rank != 4 or not isinstance(q.shape[1], int):
        return "its operands are not [batch, heads, tokens, head_dim]"
    if cross or not fake.same_size(edit.program.fake_mode, q.shape[2], k.shape[2]):
        return "its keys are not the tokens of its queries"
    return None


def _drawn_blocks(edit: Editor, node: fx.Node, heads: int, block: int) -> int:
    """The number of query and of key blocks for which random blocks are drawn.

    Raises:
        UnsupportedError: when the length is constant and its table of blocks is too large.
    """
    size = _tokens(node)
    longest = [dimension.maximum for symbol, dimension in edit.program.signature.dimensions.items() if symbol == size]
    tokens = size if isinstance(size, int) else (longest[0] if longest and longest[0] else _DRAWN)
    blocks, most = -(-tokens // block), isqrt(_LARGEST_LAYOUT // heads)
    if blocks <= most:
        return blocks
    if isinstance(size, int):
        raise UnsupportedError(
            f"sparsify-attention{{pattern=global-window-random}} keeps a table of {heads} heads × {blocks:,} × {blocks:,} "
            f"blocks for {tokens:,} tokens in blocks of {block}, more than {_LARGEST_LAYOUT:,} bytes; give block= of "
            f"{-(-tokens // most)} or more, or another pattern="
        )
    path = nodes.origin(node).module_path or node.name
    edit.note(f"{path}: random blocks are drawn for the first {most * block:,} tokens; a larger block= reaches further")
    return most


def _tokens(node: fx.Node) -> object:
    return nodes.tensor_type(Attention(node).q).shape[2]


def _masked(edit: Editor, node: fx.Node, pattern: Pattern, layout: torch.Tensor | None) -> fx.Node:
    """The attention's mask combined with the pattern."""
    if is_causal(node):
        pattern = Pattern(tuple((*alternative, CAUSAL) for alternative in pattern.alternatives), pattern.block)
    name = f"{nodes.origin(node).module_path}.layout".removeprefix(".")
    seen = write_pattern(edit, pattern, layout, Attention(node).q, Attention(node).k, name)
    mask = mask_of(node)
    if mask is None:
        return seen
    if nodes.tensor_type(mask).dtype == torch.bool:
        return edit.call(aten.__and__.Tensor, seen, mask)
    return edit.call(aten.masked_fill.Scalar, mask, edit.call(aten.logical_not.default, seen), -torch.inf)


def _exchange(edit: Editor, node: fx.Node, mask: fx.Node) -> None:
    """Replace the attention's mask."""
    kwargs = {key: value for key, value in node.kwargs.items() if key not in ("attn_mask", "bias", "is_causal")}
    attention, dropout = Attention(node), node.args[4:5]
    edit.replace_by(node, nodes.overload(node), attention.q, attention.k, attention.v, mask, *dropout, **kwargs)


def _account(mass: BlockMass, kept: torch.Tensor) -> str:
    """The kept blocks and the kept attention, in words."""
    there = (mass.count > 0) & (mass.total.sum(0) > 0)
    blocks = (kept & there).sum((1, 2)) / there.sum().clamp_min(1)
    held = (mass.total * kept).sum((1, 2)) / mass.total.sum((1, 2)).clamp_min(1e-30)
    return (
        f"{100 * float(blocks.mean()):.0f} % of blocks kept ({100 * float(blocks.min()):.0f} to "
        f"{100 * float(blocks.max()):.0f} % of a head's), with {100 * float(held.mean()):.1f} % of the attention "
        f"({100 * float(held.min()):.1f} % in the least of {len(kept)} heads)"
    )


def random_layout(heads: int, blocks: int, count: int, *, causal: bool, generator: torch.Generator) -> torch.Tensor:
    """For each head and block of queries, `count` random blocks of keys other than its own, or all where there are fewer.

    Returns booleans, [heads, blocks + 1, blocks + 1]; the last row and column, for later positions, are false.
    """
    allowed = ~torch.eye(blocks, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
    layout = torch.zeros(heads, blocks + 1, blocks + 1, dtype=torch.bool)
    for head in layout:
        scores = torch.rand(blocks, blocks, generator=generator).masked_fill(~allowed, -1.0)
        chosen = scores.topk(min(count, blocks), -1)
        head[:blocks, :blocks].scatter_(-1, chosen.indices, chosen.values >= 0)
    return layout


def with_room(kept: torch.Tensor) -> torch.Tensor:
    """The layout with one more row and column, all true, for the blocks that no text reached."""
    return torch.nn.functional.pad(kept, (0, 1, 0, 1), value=True)
