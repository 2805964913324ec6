"""The layer of each site, from the residual stream; module paths decide where they name layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from lissom.compiler.analysis.structure.attention import AttentionSite
from lissom.compiler.analysis.structure.branches import Branch, branch_of, follow, joined
from lissom.compiler.analysis.structure.feed_forward import FeedForwardSite
from lissom.compiler.ir import node as nodes

Site = AttentionSite | FeedForwardSite


@dataclass(frozen=True)
class _Place:
    """A site with its branch, None where it has none, and the path of its layer, None where paths name none."""

    site: Site
    branch: Branch | None
    path: str | None

    @property
    def kind(self) -> str:
        if isinstance(self.site, FeedForwardSite):
            return "feed-forward"
        return "cross-attention" if self.site.cross else "attention"


def layers_of(attention: Sequence[AttentionSite], feed_forward: Sequence[FeedForwardSite]) -> dict[str, list[Site]]:
    """The sites of each layer, by the layer's path.

    A layer is what a stretch of the residual stream skips: an attention with the cross-attention and the feed-forward that
    follow it, or that are added to it. Where module paths ending in a number hold an attention and a feed-forward, as
    `encoder.block.0` does, these are the layers.
    """
    layers: list[list[_Place]] = []
    for place in _in_order(attention, feed_forward):
        if layers and _goes_on(layers[-1], place):
            layers[-1].append(place)
        else:
            layers.append([place])
    sites: dict[str, list[Site]] = {}
    for layer in layers:
        others = [path for other in layers if other is not layer for place in other for path in _paths(place.site)]
        sites.setdefault(_name(layer, others), []).extend(place.site for place in layer)
    return sites


def in_order(path: str) -> list[tuple[int, str]]:
    """A key that sorts module paths with numbers as numbers: `layer.2` before `layer.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _in_order(attention: Sequence[AttentionSite], feed_forward: Sequence[FeedForwardSite]) -> list[_Place]:
    """The sites in the order of the graph, with their branches."""
    both = {prefix for site in attention for prefix in _numbered(site.path)} & {
        prefix for site in feed_forward for prefix in _numbered(site.path)
    }
    sites = sorted([*attention, *feed_forward], key=_last)
    branches = {_last(site): branch for site in sites if isinstance(branch := branch_of(site), Branch)}
    of = dict(zip(branches, joined(list(branches.values())), strict=True))
    return [
        _Place(site, of.get(_last(site)), next((prefix for prefix in _numbered(site.path) if prefix in both), None))
        for site in sites
    ]


def _last(site: Site) -> fx.Node:
    """The last linear layer of a site, or its attention where it has no output projection."""
    return site.down if isinstance(site, FeedForwardSite) else site.output or site.node


def _goes_on(layer: Sequence[_Place], place: _Place) -> bool:
    """True when a site belongs to the layer before it."""
    before = layer[-1]
    if before.path is not None or place.path is not None:
        return before.path == place.path
    if before.branch is None or place.branch is None:
        return False
    if before.branch.after is place.branch.after:
        return True
    kinds = {earlier.kind for earlier in layer}
    starts = place.kind in kinds or (place.kind == "attention" and "feed-forward" in kinds)
    return not starts and follow([before.branch, place.branch])


def _paths(site: Site) -> list[str]:
    """The module paths of a site: that of its operator, and of its last layer where the model calls the operator itself."""
    return list(dict.fromkeys([site.path, nodes.origin(_last(site)).module_path]))


def _name(layer: Sequence[_Place], others: Sequence[str]) -> str:
    """A module path that holds a site of this layer and none of another."""
    if layer[0].path is not None:
        return layer[0].path
    paths = [place.site.path for place in layer]
    plain = {_plain(path) for path in paths}
    common = [prefix for prefix in reversed(_prefixes(paths[0])) if all(f"{path}.".startswith(f"{prefix}.") for path in paths)]
    own = [prefix for place in layer for path in _paths(place.site) for prefix in _prefixes(path)]
    tried = [*(plain if len(plain) == 1 else ()), *common[:1], *own]
    return next((path for path in tried if path and not _holds(path, others)), _plain(paths[0]))


def _holds(path: str, others: Sequence[str]) -> bool:
    """True for the path of a module that holds one of the others."""
    return any(f"{other}.".startswith(f"{path}.") for other in others)


def _plain(path: str) -> str:
    """The deepest prefix of a path that ends in a number, or the path."""
    return next(iter(_numbered(path)), path)


def _numbered(path: str) -> list[str]:
    """The prefixes of a path that end in a number, deepest first."""
    return [prefix for prefix in reversed(_prefixes(path)) if prefix.rpartition(".")[2].isdigit()]


def _prefixes(path: str) -> list[str]:
    """The modules that hold a path, the outermost first, and the path itself."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
