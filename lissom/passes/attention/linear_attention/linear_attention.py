"""Replace softmax attention by linear attention, whose time and memory grow linearly with the sequence length.

    softmax(scale · q kᵀ) v   ->   φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1)

Katharopoulos et al. 2020, Transformers are RNNs, eq. 4 to 12. https://arxiv.org/abs/2006.16236. In causal attention the sums
are over the tokens so far; `lissom::linear_attention` computes them in chunks. Choices of `features`:

| features | φ(x) | learned from calibration data |
|---|---|---|
| elu | elu(s x) + 1 | s, one number per head |
| relu | max(x, 0) | nothing |
| hedgehog | [exp(x W + b), exp(-x W - b)] | W and b of every head |

They are fitted to the softmax weights: Zhang et al. 2024, Hedgehog, eq. 6 to 8. https://arxiv.org/abs/2402.04347
Without data s is 1, W is the square root of the scale times the identity, and b is 0. Features of keys that the mask hides are
zero. The history shows the agreement with softmax for each layer.

`only` selects layers. The result is differentiable: in all six layers of MiniLM it loses 4.1 % of recall@10, and 0.9 % after
ten minutes of `distill`. Features are computed in float32. Passes that match attention, such as `prune-heads` and
`pack-tokens`, no longer find it; put them before this pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx, nn

from lissom.compiler.analysis.module_filter import obstacle_by_name
from lissom.compiler.analysis.structure.linear import width
from lissom.compiler.analysis.structure.masks import mask_kind
from lissom.compiler.analysis.structure.operands import operands_obstacle, scale_of, shared_operands
from lissom.compiler.analysis.structure.padding import KeyMask, key_mask
from lissom.compiler.ir import fake
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Attention
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.operators import ATTENTIONS
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, spread
from lissom.compiler.pipeline.pass_kinds import Approximation, Requirement
from lissom.ops.linear_attention import linear_attention
from lissom.passes.attention.linear_attention.feature_maps import (
    LARGEST_EXPONENT,
    FeatureMap,
    Maps,
    agreement,
    fit_maps,
    initial_maps,
    observe_weights,
)

aten = torch.ops.aten

_TOKENS = 4096
"""Calibration tokens that are observed: many more than W and b of a head have parameters per column."""
_ROWS = 64
"""Queries per sequence whose softmax weights are observed."""
_CHUNKS = (64, 256)
"""The fewest and the most tokens of a chunk."""


def _first_state(program: Program) -> fx.Node | None:
    return next((node for node in program if node.op == "get_attr" and str(node.target) in program.state), None)


@dataclass(frozen=True)
class LinearAttention(Approximation):
    """Replaces softmax attention by linear attention.

    Attributes:
        features: the feature map φ; see the table.
        skip: module paths whose attention stays softmax, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
        only: module paths of the attention to change, in the same form; others stay.
    """

    features: FeatureMap = "hedgehog"
    skip: str = ""
    only: str = ""

    requires = (
        Requirement(
            "a program keeps no state, such as a cache of keys and values",
            _first_state,
            "capture the model without a cache, with use_cache=False",
        ),
    )

    def run(self, edit: Editor) -> None:
        sites = [_site(edit.program, node) for node in edit.treatable(partial(self._obstacle, edit), *ATTENTIONS)]
        maps = {site.node: initial_maps(self.features, site.sizes, site.scale, site.device) for site in sites}
        if sites and edit.data:
            maps = self._fit(edit, sites, maps)
        elif sites and self.features != "relu":
            edit.note(f"there is no calibration data, so {_UNFITTED[self.features]}; pass data= to fit them to softmax")
        writer = _Writer(edit, self.features)
        for site in sites:
            writer.write(site, maps[site.node])

    def _obstacle(self, edit: Editor, node: fx.Node) -> str | None:
        """The reason an attention stays softmax; None if it can be replaced."""
        reason = obstacle_by_name(node, skip=self.skip, only=self.only)
        return reason or operands_obstacle(edit, node) or _obstacle_in_scores(edit, node)

    def _fit(self, edit: Editor, sites: Sequence[_Site], maps: dict[fx.Node, Maps]) -> dict[fx.Node, Maps]:
        """The maps fitted to softmax layer by layer, on the queries and keys of the unchanged program."""
        observed = _observe(edit, sites)
        fitted: dict[fx.Node, Maps] = {}
        agreements: list[str] = []
        for finished, site in enumerate(sites):
            edit.current = site.node
            edit.report("layers", finished, len(sites))
            with torch.no_grad():
                data = [observe_weights(q, k, site.scale, seen=seen, real=real) for q, k, seen, real in observed.pop(site.node)]
            fitted[site.node] = fit_maps(self.features, maps[site.node], data)
            near = agreement(self.features, fitted[site.node], data)
            path = nodes.origin(site.node).module_path or site.node.name
            agreements.append(f"{path} {near.mass:.0%} and {near.divergence:.2g}")
        edit.note(f"agreement with softmax (mass on the same keys, divergence in nats): {'; '.join(agreements)}")
        return fitted


_UNFITTED = {"elu": "scales are 1", "hedgehog": "projections are the identity"}


@dataclass(frozen=True)
class _Site:
    """One attention to replace; k and v: before they are repeated for the query heads of a group."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    scale: float
    mask: KeyMask

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of query heads and key heads, and head_dim."""
        return nodes.fixed_size(self.q, 1), nodes.fixed_size(self.k, 1), nodes.fixed_size(self.q, 3)

    @property
    def device(self) -> torch.device:
        return nodes.tensor_type(self.q).device


def _site(program: Program, node: fx.Node) -> _Site:
    (k, v), mask = shared_operands(node), key_mask(program, node)
    assert mask is not None
    return _Site(node, Attention(node).q, k, v, scale_of(node), mask)


def _obstacle_in_scores(edit: Editor, node: fx.Node) -> str | None:
    """The reason linear attention cannot express an attention's scores; None if it can."""
    if node.kwargs.get("softcap"):
        return "its scores are soft-capped"
    if node.kwargs.get("sinks") is not None:
        return "it has sinks beside its keys"
    if mask_kind(edit.program, node).bias:
        return "a bias is added to its scores"
    mask = key_mask(edit.program, node)
    if mask is None:
        return "its mask hides more than padding and later tokens"
    q, k = (nodes.tensor_type(operand) for operand in (Attention(node).q, Attention(node).k))
    mode = edit.program.fake_mode
    if mask.causal and not fake.same_size(mode, q.shape[2], k.shape[2]):
        return "it is causal, and its queries are not as many as its keys"
    if mask.padding is not None and not fake.same_size(mode, nodes.tensor_type(mask.padding).shape[0], q.shape[0]):
        return "its padding mask is broadcast"
    return None


@dataclass
class _Writer:
    """Writes linear attention into a program; calls that depend only on a padding mask are written once."""

    edit: Editor
    features: FeatureMap
    kept: dict[tuple[fx.Node, torch.dtype], fx.Node] = field(default_factory=dict[tuple[fx.Node, torch.dtype], fx.Node])

    def write(self, site: _Site, maps: Maps) -> None:
        path = nodes.origin(site.node).module_path
        with self.edit.before(site.node):
            q, k = self._changed(site.q, "query", path, maps, 0), self._changed(site.k, "key", path, maps, 1)
            q, k = self._query_features(q), self._key_features(k)
            if site.mask.padding is not None:
                k = self.edit.call(aten.mul.Tensor, k, self._kept_keys(site.mask.padding, nodes.tensor_type(k).dtype))
            options = {"causal": True, "chunk": chunk_for(width(k))} if site.mask.causal else {}
            call = self.edit.call(linear_attention, q, k, site.v, **options)
        self.edit.replace(site.node, call)

    def _changed(self, x: fx.Node, side: str, path: str, maps: Maps, index: int) -> fx.Node:
        """x in at least float32, multiplied by the map's parameters."""
        dtype = torch.promote_types(nodes.tensor_type(x).dtype, torch.float32)
        if nodes.tensor_type(x).dtype != dtype:
            x = self.edit.call(aten.to.dtype, x, dtype)
        name = f"{path}.{side}_features" if path else f"{side}_features"

        def weight(what: str, values: tuple[torch.Tensor, ...]) -> fx.Node:
            return self.edit.weight(f"{name}.{what}", nn.Parameter(values[index].to(dtype), requires_grad=False))

        if maps.matrices:
            x = self.edit.call(aten.matmul.default, x, weight("weight", maps.matrices))
            return self.edit.call(aten.add.Tensor, x, weight("bias", maps.biases))
        return self.edit.call(aten.mul.Tensor, x, weight("scale", maps.factors)) if maps.factors else x

    def _query_features(self, x: fx.Node) -> fx.Node:
        if self.features != "hedgehog":
            return self._simple(x)
        call = self.edit.call
        # Divided by the largest feature of the row, which cancels, to avoid overflow.
        largest = call(aten.amax.default, call(aten.abs.default, x), [-1], True)
        both = call(aten.cat.default, [x, call(aten.neg.default, x)], -1)
        return call(aten.exp.default, call(aten.sub.Tensor, both, largest))

    def _key_features(self, x: fx.Node) -> fx.Node:
        if self.features != "hedgehog":
            return self._simple(x)
        call = self.edit.call
        x = call(aten.clamp.default, x, -LARGEST_EXPONENT, LARGEST_EXPONENT)
        return call(aten.exp.default, call(aten.cat.default, [x, call(aten.neg.default, x)], -1))

    def _simple(self, x: fx.Node) -> fx.Node:
        if self.features == "relu":
            return self.edit.call(aten.relu.default, x)
        return self.edit.call(aten.add.Tensor, self.edit.call(aten.elu.default, x), 1.0)

    def _kept_keys(self, padding: fx.Node, dtype: torch.dtype) -> fx.Node:
        """1 for visible keys and 0 for others, [batch, 1, keys, 1]."""
        if (padding, dtype) not in self.kept:
            kept = self.edit.call(aten.to.dtype, self.edit.call(aten.ne.Scalar, padding, 0), dtype)
            kept = self.edit.call(aten.unsqueeze.default, self.edit.call(aten.unsqueeze.default, kept, 1), 3)
            self.kept[padding, dtype] = kept
        return self.kept[padding, dtype]


def chunk_for(features: int) -> int:
    """Tokens per chunk, a power of two: as many as features, within `_CHUNKS`."""
    return min(max(1 << (features - 1).bit_length(), _CHUNKS[0]), _CHUNKS[1])


_Seen = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of one sample: some rows of q, all of k, the visible keys of these rows, and which rows count."""


def _observe(edit: Editor, sites: Sequence[_Site]) -> dict[fx.Node, list[_Seen]]:
    """Some queries and all keys of each attention, sample by sample."""
    observed: dict[fx.Node, list[_Seen]] = {site.node: [] for site in sites}
    generator = torch.Generator().manual_seed(0)
    program, samples = edit.program, spread(edit.data, _TOKENS)
    for finished, sample in enumerate(samples):
        edit.report("observe", finished, len(samples))
        values: dict[fx.Node, torch.Tensor] = dict(zip(program.placeholders, sample, strict=True))
        wanted = {operand for site in sites for operand in (site.q, site.k)}

        def keep(
            node: fx.Node, value: object, wanted: set[fx.Node] = wanted, values: dict[fx.Node, torch.Tensor] = values
        ) -> None:
            if node in wanted and isinstance(value, torch.Tensor):
                values[node] = value

        with torch.no_grad(), kept_state(program):
            program.run(sample, keep)
        for site in sites:
            observed[site.node].append(_seen(program, site, sample, (values[site.q], values[site.k]), generator))
    return observed


def _seen(
    program: Program, site: _Site, sample: Sample, pair: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
) -> _Seen:
    q, k = pair
    queries, keys = q.shape[2], k.shape[2]
    rows = torch.randperm(queries, generator=generator)[:_ROWS].sort().values.to(q.device)
    kept = torch.ones(len(q), keys, dtype=torch.bool, device=q.device)
    if site.mask.padding is not None:
        kept = sample[program.placeholders.index(site.mask.padding)] != 0
    seen = kept[:, None, None, :]
    if site.mask.causal:
        seen = seen & (rows[:, None] >= torch.arange(keys, device=q.device))
    real = kept[:, rows] if queries == keys else kept.new_ones(len(q), len(rows))
    return q[:, :, rows], k, seen, real
