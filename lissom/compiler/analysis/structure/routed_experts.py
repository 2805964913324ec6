"""The experts of a mixture as weights and calls that have one entry per expert, so that experts can be removed.

    scores = f(x Wᵀ + b)                      the router, [tokens, experts]
    weights, ids = topk(scores)               the choice, [tokens, top_k]
    order = argsort(ids)                      rows sorted by expert, [tokens · top_k]
    out = product(product(x[order], W₁), W₂)  grouped products with stacks [experts, ...]
    y[t] = Σ_k weights[t, k] out[t, k]

Grouped routing, as in DeepSeek-V3, first chooses groups of as many experts each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from lissom.compiler.analysis.structure.feed_forward import mixture_site
from lissom.compiler.analysis.structure.linear import bias_of, producers, weight_of
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.calls import Binary, GroupedProduct, MaskedFill, TopK
from lissom.compiler.ir.match import computed_from, only_user
from lissom.compiler.ir.operators import GROUPED_PRODUCTS, MASKED_FILLS, SHAPES, SIZES_AT, SOFTMAX, is_pointwise
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.types import ScalarType, fixed
from lissom.compiler.ir.view_calls import Gather, Index, Item

aten = torch.ops.aten

_SCORING = {
    *(*SOFTMAX, *MASKED_FILLS, aten.topk.default, aten.sum.dim_IntList, aten.amax.default, aten.max.dim),
    *(aten.zeros_like.default, aten.scatter.value, aten.scatter.src),
}
"""Operators between a router and its choice, besides views and element-wise ones."""
_COUNTING = {aten.cumsum.default}
"""Operators between the number of rows per expert and the grouped products, besides views and element-wise ones."""


@dataclass
class RoutedExperts:
    """The experts of one mixture.

    Attributes:
        router: the linear layer that scores the experts.
        choice: the `topk` that selects experts.
        experts: their number.
        groups: groups of equally many experts from which grouped routing chooses first; 1 without them.
        least: experts that must stay in each group.
        masked: the values after which a mask of -inf removes experts from the choice: the router's output, and the scores
            with a correction bias where there is one.
        masks: the calls that set scores to -inf by a stored mask.
        stacks: the weights with one entry per expert, each with its dimension.
        sizes: calls that list a size which depends on the number of experts.
        counts: the calls that count the rows of each expert.
        ids: the expert of each row, sorted, [tokens · top_k].
        order: the place of each row before sorting, [tokens · top_k].
        products: the grouped products.
        weighted: the outputs of the experts times the router's weights, [tokens · top_k, features].
    """

    router: fx.Node
    choice: fx.Node
    experts: int
    top_k: int
    groups: int = 1
    least: int = 1
    masked: tuple[fx.Node, ...] = ()
    masks: list[fx.Node] = field(default_factory=list[fx.Node])
    stacks: dict[fx.Node, int] = field(default_factory=dict[fx.Node, int])
    sizes: list[fx.Node] = field(default_factory=list[fx.Node])
    counts: list[fx.Node] = field(default_factory=list[fx.Node])
    ids: fx.Node | None = None
    order: fx.Node | None = None
    products: list[fx.Node] = field(default_factory=list[fx.Node])
    weighted: fx.Node | None = None

    @property
    def path(self) -> str:
        return nodes.origin(self.router).module_path

    @property
    def per_group(self) -> int:
        return self.experts // self.groups


def routed_experts(program: Program) -> Sequence[tuple[fx.Node, RoutedExperts | str]]:
    """The mixtures of a program by their routers, each with its experts or the reason why these cannot be removed."""
    choices = [choice for node in program.nodes(*GROUPED_PRODUCTS) if (choice := _choice_of(node)) is not None]
    found = {site.router: _routed(site.router, choice) for choice in dict.fromkeys(choices) if (site := mixture_site(choice))}
    others = [site.router for node in program.nodes(aten.topk.default) if (site := mixture_site(node)) is not None]
    reason = "its experts are no grouped products of rows sorted by expert"
    return tuple((dict.fromkeys(others, reason) | found).items())


def _choice_of(product: fx.Node) -> fx.Node | None:
    """The `topk` that decides which rows belong to which group."""
    return next((node for node in computed_from([GroupedProduct(product).ends]) if node.target is aten.topk.default), None)


def _routed(router: fx.Node, choice: fx.Node) -> RoutedExperts | str:
    site = RoutedExperts(router, choice, fixed(nodes.tensor_type(TopK(choice).x).shape[-1]), fixed(TopK(choice).k))
    return _add_router(site) or _add_scores(site) or _add_choice(site) or _add_weighted(site) or site


def _add_router(site: RoutedExperts) -> str | None:
    matrix, bias = matrix_of(site.router), bias_of(site.router)
    if isinstance(matrix, str):
        return f"its router: {matrix}"
    return _add_stack(site, matrix.node, int(matrix.transposed)) or (None if bias is None else _add_stack(site, bias, 0))


def _add_stack(site: RoutedExperts, weight: fx.Node, dim: int) -> str | None:
    """Record a weight with one entry per expert; the reason against it if there is one."""
    if weight.op != "get_attr":
        return f"'{weight.name}' is computed"
    if len(weight.users) > 1 and weight not in site.stacks:
        return f"the weight '{weight.target}' is read elsewhere too"
    if nodes.tensor_type(weight).shape[dim] != site.experts:
        return f"the weight '{weight.target}' has no entry per expert"
    site.stacks[weight] = dim
    return None


def _add_scores(site: RoutedExperts) -> str | None:
    """Record what lies between router and choice."""
    if producers(TopK(site.choice).x) != (site.router,):
        return "its scores come from several layers"
    region = list(computed_from([TopK(site.choice).x], lambda node: node is not site.router and not _is_size(node)))
    for node in region:
        shape = nodes.tensor_type(node).shape if nodes.is_tensor(node) else ()
        if len(shape) > 2 and site.experts != shape[-1] and shape[-2] * shape[-1] == site.experts:
            site.groups = fixed(shape[-2])
    biased: list[fx.Node] = []
    for node in region:
        if node is not site.router and (reason := _add_score(site, node, biased)):
            return reason
    if len(biased) > 1:
        return "its scores have several biases"
    site.masked = (site.router, *biased)
    site.least = _least(site, region)
    return _obstacle_of_readers(site, region)


def _add_score(site: RoutedExperts, node: fx.Node, biased: list[fx.Node]) -> str | None:
    if _is_size(node):
        return None
    if node.op == "get_attr":
        typed = nodes.tensor_type(node)
        dims = [dim for dim, size in enumerate(typed.shape) if size == site.experts]
        if typed.rank == 0:
            return None
        if typed.dtype.is_floating_point:
            biased += dict.fromkeys(_reader(node) for node in node.users)
        return _add_stack(site, node, dims[0] if len(dims) == 1 else 0)
    if node.op != "call_function":
        return f"its scores depend on the input '{node.name}'"
    if Item.of(node) is not None:
        return None
    if _stored_mask(node) is not None:
        site.masks.append(node)
    if not (is_pointwise(node) or node.target in SHAPES or node.target in _SCORING):
        return f"'{node.name}' ({node.target}) computes its scores in a way that has no rule"
    if node.target in SIZES_AT and _has_experts(site, node):
        site.sizes.append(node)
    return None


def _is_size(node: fx.Node) -> bool:
    return isinstance(nodes.node_type(node), ScalarType)


def _reader(node: fx.Node) -> fx.Node:
    """The first user of a weight behind views."""
    while node.target in SHAPES and (user := only_user(node)) is not None:
        node = user
    return node


def _has_experts(site: RoutedExperts, node: fx.Node) -> bool:
    """True for a value whose last dimension is of experts, or of the experts of one group."""
    shape = nodes.tensor_type(node).shape
    return shape[-1] == site.experts or (site.groups > 1 and shape[-2:] == (site.groups, site.per_group))


def _least(site: RoutedExperts, region: Sequence[fx.Node]) -> int:
    """The experts that each group needs, so that every `topk` finds as many as it selects."""
    inner, chosen_groups = 1, 1
    for node in region:
        if (top := TopK.of(node)) is not None:
            if nodes.tensor_type(top.x).rank > nodes.tensor_type(TopK(site.choice).x).rank:
                inner = fixed(top.k)
            else:
                chosen_groups = fixed(top.k)
    return max(inner, -(-site.top_k // chosen_groups))


def _obstacle_of_readers(site: RoutedExperts, region: Sequence[fx.Node]) -> str | None:
    """The reason why a value with one entry per expert is needed whole; None if there is none."""
    inside = {*region, site.choice}
    for node in region:
        if node.op != "call_function" or not nodes.is_tensor(node) or not _has_experts(site, node):
            continue
        for user in node.users:
            if user.op == "output":
                return "the program returns its scores"
            gathered = Gather.of(user)
            if user not in inside and (gathered is None or gathered.x is not node):
                return f"'{user.name}' reads its scores too"
    return None


def _add_choice(site: RoutedExperts) -> str | None:
    """Record what depends on the chosen ids."""
    pending = [user for user in site.choice.users if (item := Item.of(user)) is not None and item.index == 1]
    while pending:
        node = pending.pop()
        for user in node.users:
            follows, reason = _follow_ids(site, node, user)
            if reason:
                return reason
            pending += follows
    if not site.products or site.ids is None or site.order is None:
        return "its rows are not sorted by expert"
    return None


def _follow_ids(site: RoutedExperts, node: fx.Node, user: fx.Node) -> tuple[list[fx.Node], str | None]:
    """The values with ids or counts that a user of such a value yields, and the reason why experts cannot be renumbered."""
    if nodes.is_call(user, aten.sort.default):
        items = {item.index: item.node for item in map(Item.of, user.users) if item is not None}
        if site.ids is not None or 0 not in items or 1 not in items:
            return [], f"'{user.name}' sorts its rows in a way that has no rule"
        site.ids, site.order = items[0], items[1]
        return [items[0]], None
    if nodes.is_call(user, aten.histc.default):
        if user.args[1:] != (site.experts, 0, site.experts - 1):
            return [], f"'{user.name}' does not count one expert per bin"
        site.counts.append(user)
        return [], _add_products(site, user)
    if (looked_up := Index.of(user)) is not None and list(looked_up.indices) == [node]:
        return [], _add_stack(site, looked_up.x, 0)
    if (gathered := Gather.of(user)) is not None and gathered.indices is node:
        return [], None
    if user.target in SHAPES:
        return [user], None
    return [], f"'{user.name}' reads the ids of its experts"


def _add_products(site: RoutedExperts, counts: fx.Node) -> str | None:
    """Record the grouped products whose rows these counts divide, and their stacks."""
    pending = [counts]
    while pending:
        for user in pending.pop().users:
            if user.target in GROUPED_PRODUCTS:
                site.products.append(user)
                matrix = weight_of(user) and matrix_of(user, stacks=True)
                if not isinstance(matrix, Matrix):
                    return f"'{user.name}': {matrix or 'its weight is computed'}"
                if reason := _add_stack(site, matrix.node, 0):
                    return reason
            elif user.target in SHAPES or user.target in _COUNTING or is_pointwise(user):
                pending.append(user)
            else:
                return f"'{user.name}' reads the number of rows of its experts"
    return None


def _add_weighted(site: RoutedExperts) -> str | None:
    """Record the product of the experts' outputs with the router's weights."""
    order = {node: place for place, node in enumerate(site.router.graph.nodes)}
    site.products.sort(key=lambda node: order[node])
    node = site.products[-1]
    while (user := only_user(node)) is not None:
        if nodes.is_call(user, aten.mul.Tensor):
            other = Binary(user).right if Binary(user).left is node else Binary(user).left
            if nodes.is_tensor(other) and nodes.tensor_type(other).shape[1:] == (1,):
                site.weighted = user
                return None
        if not nodes.is_call(user, aten.add.Tensor):
            break
        node = user
    return "the outputs of its experts are not multiplied by the router's weights"


def dropped_experts(program: Program, site: RoutedExperts) -> torch.Tensor:
    """The experts that masks of -inf keep from being chosen, booleans [experts]."""
    dropped = torch.ones(site.experts, dtype=torch.bool)
    for value in site.masked:
        mask = _stored_mask(user) if (user := only_user(value)) is not None else None
        dropped &= torch.zeros(()).bool() if mask is None else program.weight(str(mask.target)).cpu()
    return dropped


def _stored_mask(node: fx.Node) -> fx.Node | None:
    """The stored mask by which a call sets values to -inf."""
    filled = MaskedFill.of(node)
    return None if filled is None or filled.value != -torch.inf or filled.mask.op != "get_attr" else filled.mask
