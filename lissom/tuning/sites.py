"""The variables of the search: groups of sites of a program, and the options that each group has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from lissom.compiler.analysis.amounts import AmountSite
from lissom.compiler.analysis.structure.kv_cache import cache_writes
from lissom.compiler.analysis.structure.linear import weight_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.passes.sites import sites

PLAIN = "none"
LOW_RANK = "low-rank"
"""The form of linear layers as two factors with half of their bytes."""
BLOCKS = "blocks"
"""The form of linear layers that keep the blocks of weights that matter most."""
BLOCKS_IN_INT8 = f"{BLOCKS}-int8-dynamic"
TABLE, PATTERN, EXPERTS, CACHE = "table", "pattern", "experts", "cache"
"""The kinds of groups that are an embedding table or LM head, the visible keys of an attention, the experts of a mixture, and
the whole KV cache."""
NO_LINEARS = (TABLE, PATTERN, EXPERTS, CACHE)
"""The kinds whose schemes are not those of linear layers."""
SCHEMES = ("int8-dynamic", "int8-group", "int8-weight", "int4-dynamic", "int4-weight", "nvfp4-weight")
"""The schemes of `quantize` that need no calibration data, so that single layers and LM heads can have them."""
UNTIED = "untied-"
"""Begins the four-bit schemes of an LM head that gets a matrix of its own; its table is then in int8."""
TABLE_SCHEMES = ("int8-weight", "int4-weight")
"""The schemes of embedding tables that are no LM head."""
PATTERNS = ("measured", "window")
"""The patterns of `sparsify-attention`, with the default window or mass."""
CACHES = ("cache-int8", "cache-int4")
"""The forms of a KV cache; keys are rotated before they are stored in four bits."""
FRACTIONS = (0.75, 0.5, 0.25, 0.125)
"""The amounts of heads, neurons and experts that are tried, as fractions."""
SERVERS: Mapping[str, tuple[str, ...]] = {"vllm": ("int8-dynamic", "int8-weight", "int4-weight")}
"""By server, the schemes of linear layers that it reads in checkpoints."""
_LEAST_SIZE = 64
"""Of a matrix that may become two factors or blocks."""
_MULTIPLE = 16
"""Numbers of neurons are multiples of this where there are several times as many."""


@dataclass(frozen=True)
class Option:
    """One option of a group: the units that stay, and their scheme.

    Attributes:
        left: heads, neurons or experts that stay, 0 if the whole part is removed.
        scheme: of its layers.
        pooled: key/value heads that stay when they are pooled, 0 for all; only where all heads stay, since removed heads take
            key/value heads along.
    """

    left: int
    scheme: str = PLAIN
    pooled: int = 0


@dataclass
class Group:
    """Sites that must have the same amount: one variable of the search.

    Attributes:
        name: the module path of the first site.
        kind: `attention`, `feed-forward`, `linear`, `table`, `pattern`, `experts` or `cache`.
        size: heads, neurons or experts; 1 where none can be removed.
        units: the paths that the amounts of `prune-heads`, `prune-neurons` or `prune-experts` name.
        multiple: units that stay are a multiple of this.
        least: the fewest that may stay.
        layer: the path by which `prune-layers` removes the part; empty if it cannot.
        linears: the paths of its linear layers, tables or attentions, as passes name them.
        shapes: out_features and in_features of each.
        schemes: the schemes that all its layers or tables take, or the patterns of an attention.
        option: of `quantize`, by which it takes a table: `embeddings` or `lm_head`.
        tied: whether a table is both.
        pools: numbers of key/value heads that `pool-heads` may leave, the largest first.
        key_value_heads: their present number.
        symmetric: whether quantized weights have no zero points.
    """

    name: str
    kind: str
    size: int = 1
    units: list[str] = field(default_factory=list[str])
    multiple: int = 1
    least: int = 1
    layer: str = ""
    linears: list[str] = field(default_factory=list[str])
    shapes: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    schemes: tuple[str, ...] = (PLAIN,)
    option: str = ""
    tied: bool = False
    pools: tuple[int, ...] = ()
    key_value_heads: int = 0
    symmetric: bool = False

    @property
    def likeness(self) -> tuple[object, ...]:
        """Equal for groups whose options take the same time."""
        return self.kind, self.size, bool(self.layer), self.schemes, tuple(self.shapes), self.pools

    @property
    def whole(self) -> Option:
        """The group as it is."""
        return Option(self.size)

    def lefts(self) -> list[int]:
        """The numbers of units that may stay, all of them first; 0 at the end if the part can be removed."""
        lefts = [self.size]
        multiple = max(self.multiple, _MULTIPLE if self.size >= 4 * _MULTIPLE and self.kind != EXPERTS else 1)
        for fraction in FRACTIONS if self.units else ():
            lefts.append(max(self.least, round(fraction * self.size / multiple) * multiple))
        return list(dict.fromkeys([*lefts, *([0] if self.layer else [])]))

    def options(self, schemes: Iterable[str]) -> list[Option]:
        """Every option with these schemes."""
        fitting = [scheme for scheme in schemes if scheme in self.schemes]
        options = [Option(left, scheme) for left in self.lefts() for scheme in (fitting if left else [PLAIN])]
        return [*options, *(Option(self.size, scheme, pooled) for pooled in self.pools for scheme in fitting)]


def groups_of(program: Program) -> list[Group]:
    """The groups of a program in canonical form: attentions, feed-forwards, other linear layers, experts, tables, patterns, and
    the KV cache."""
    known = _Sites.of(program)
    model_structure = program.fact(structure)
    groups: dict[object, Group] = {}
    for layer in model_structure.layers:
        for site in layer.attention:
            ends = [site.output] if site.output is not None else []
            group = known.group(groups, site.path, site.node, "attention", [*site.q, *site.k, *site.v, *ends])
            if len(layer.attention) == 1:
                known.make_removable(group, layer.path, "attention")
            known.make_poolable(group, site.path)
        for site in layer.feed_forward:
            group = known.group(groups, site.path, site.down, "feed-forward", [*site.up, site.down])
            if len(layer.feed_forward) == 1:
                known.make_removable(group, layer.path, "feed-forward")
    ordered = sorted(groups.values(), key=lambda group: group.kind)
    parts = (group for group in ordered if len(group.lefts()) > 1 or group.linears)
    return [*parts, *known.rest(), *known.others]


def groups_for(server: str, groups: Sequence[Group]) -> list[Group]:
    """What a checkpoint for this server can say: a scheme for each attention and each feed-forward, without zero points.

    q, k and v are in one group, and so are gate and up, because the server makes one layer of them. Checkpoints with several
    schemes are loaded by transformers only where weights have no zero points.
    """
    kept: list[Group] = []
    for group in groups:
        schemes = tuple(scheme for scheme in group.schemes if scheme in (PLAIN, *SERVERS[server]))
        if group.kind in ("attention", "feed-forward") and len(schemes) > 1:
            fixed = Group(group.name, group.kind, linears=group.linears, shapes=group.shapes, schemes=schemes, symmetric=True)
            kept.append(fixed)
    return kept


def linear_paths(program: Program) -> list[str]:
    """The paths of all linear layers that `quantize` may treat."""
    return [site.path for site in sites(program) if site.kind == "linear" and "quantize" in site.takes]


@dataclass
class _Sites:
    """The sites for which passes take amounts, and those that no group has yet."""

    units: Mapping[str, AmountSite]
    layers: Mapping[str, AmountSite]
    pools: Mapping[str, AmountSite]
    linears: dict[str, AmountSite]
    shapes: Mapping[str, tuple[int, ...]]
    weights: Mapping[str, str]
    others: Sequence[Group]

    @classmethod
    def of(cls, program: Program) -> _Sites:
        units: dict[str, AmountSite] = {}
        layers: dict[str, AmountSite] = {}
        pools: dict[str, AmountSite] = {}
        linears: dict[str, AmountSite] = {}
        experts, tables, patterns = list[Group](), list[Group](), list[Group]()
        for site in sites(program):
            if "prune-heads" in site.takes or "prune-neurons" in site.takes:
                units |= dict.fromkeys(site.paths, site)
            elif site.kind == "layer":
                layers[site.path] = site
            elif "pool-heads" in site.takes:
                pools[site.path] = site
            elif site.kind == "linear" and "quantize" in site.takes:
                linears[site.path] = site
            elif site.kind == EXPERTS:
                experts += _experts_of(site)
            elif (table := _table_of(site)) is not None:
                tables.append(table)
            elif "sparsify-attention" in site.takes:
                patterns.append(_pattern_of(site))
        shapes: dict[str, tuple[int, ...]] = {}
        names: dict[str, str] = {}
        for node in program.nodes():
            weight = weight_of(node)
            if weight is not None:
                name = str(weight.target).removesuffix(".weight")
                path = nodes.origin(node).module_path
                for key in (path, name):
                    names.setdefault(name, key if key in linears else name)
                    shapes.setdefault(key, tuple(int(size) for size in program.weight(str(weight.target)).shape))
        for table in tables:
            table.shapes = [shapes.get(table.name, ())]
        caches = [Group(CACHE, CACHE, linears=[CACHE], schemes=(PLAIN, *CACHES))] if cache_writes(program) else []
        return cls(units, layers, pools, linears, shapes, names, [*experts, *tables, *patterns, *caches])

    def group(self, groups: dict[object, Group], path: str, node: fx.Node, kind: str, layers: Sequence[fx.Node]) -> Group:
        """The group of a site, with the site's linear layers added to it."""
        site = self.units.get(path)
        shared = frozenset((*site.paths, *site.shares)) if site is not None else node
        group = groups.setdefault(shared, Group(path, kind))
        group.layer = ""
        if site is not None:
            group.size = site.size
            if site.path not in group.units:
                group.units.append(site.path)
        for layer in dict.fromkeys(layers):
            weight = weight_of(layer)
            linear = self.weights.get(str(weight.target).removesuffix(".weight")) if weight is not None else None
            if linear is not None and (linear_site := self.linears.pop(linear, None)) is not None:
                self._add(group, linear_site)
        return group

    def _add(self, group: Group, site: AmountSite) -> None:
        shape = self.shapes.get(site.path, (site.size, site.size))
        schemes = [scheme for scheme in SCHEMES if scheme in site.takes["quantize"]]
        if min(shape) >= _LEAST_SIZE:
            schemes += [LOW_RANK] if "low-rank" in site.takes else []
            schemes += [BLOCKS, BLOCKS_IN_INT8] if "2:4" in site.takes.get("sparsify", ()) and "int8-dynamic" in schemes else []
        before = group.schemes[1:] if group.linears else tuple(schemes)
        group.schemes = (PLAIN, *(scheme for scheme in before if scheme in schemes))
        group.linears.append(site.path)
        group.shapes.append(shape)

    def make_removable(self, group: Group, layer: str, part: str) -> None:
        site = self.layers.get(layer)
        alone = not group.units or len(group.units) == 1
        if site is not None and alone and f"prune-layers{{part={part}}}" in site.takes:
            group.layer = layer

    def make_poolable(self, group: Group, path: str) -> None:
        """Add the numbers of key/value heads to an attention that is alone in its group."""
        site = self.pools.get(path)
        if site is not None and group.units == [path]:
            wanted = {round(fraction * site.size) for fraction in FRACTIONS}
            group.key_value_heads = site.size
            group.pools = tuple(
                left for left in sorted(_legal_counts(site), reverse=True) if left in wanted and left < site.size
            )
        else:
            group.pools = ()

    def rest(self) -> list[Group]:
        """A group for each linear layer that no other group has."""
        groups: list[Group] = []
        for site in self.linears.values():
            group = Group(site.path, "linear")
            self._add(group, site)
            if len(group.schemes) > 1:
                groups.append(group)
        return groups


def _legal_counts(site: AmountSite) -> list[int]:
    """The numbers that passes take at a site."""
    return sorted(value for values in site.takes.values() for value in values if isinstance(value, int))


def _table_of(site: AmountSite) -> Group | None:
    """The group of an embedding table or LM head; None for other sites, and for those that no scheme fits."""
    for option in ("embeddings", "lm_head"):
        values = site.takes.get(f"quantize{{{option}=true}}", ())
        schemes = [scheme for scheme in (TABLE_SCHEMES if site.kind == "embedding" else SCHEMES) if scheme in values]
        if schemes:
            tied = option == "embeddings" and site.kind == "linear"
            schemes += [f"{UNTIED}{scheme}" for scheme in schemes if tied and scheme.startswith("int4")]
            return Group(site.path, TABLE, linears=[*site.paths], schemes=(PLAIN, *schemes), option=option, tied=tied)
    return None


def _experts_of(site: AmountSite) -> list[Group]:
    """The group of the experts of a mixture; none where all must stay."""
    counts = _legal_counts(site)
    if len(counts) < 2:
        return []
    return [Group(site.path, EXPERTS, site.size, [site.path], counts[1] - counts[0], counts[0])]


def _pattern_of(site: AmountSite) -> Group:
    values = site.takes["sparsify-attention"]
    return Group(
        site.path, PATTERN, linears=[site.path], schemes=(PLAIN, *(pattern for pattern in PATTERNS if pattern in values))
    )
