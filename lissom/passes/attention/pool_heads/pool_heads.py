"""Pool key/value heads: each group of neighbouring query heads shares one key head and one value head.

    k̄ = mean k_i,  v̄ = mean v_i                                       of the heads i of a group      Ainslie et al. 2023, §2.1

The rows of the projections become equal within a group; `merge-equal-heads` then keeps one of each. Multi-head attention
becomes grouped-query attention, whose KV cache is smaller by the size of a group. Grouped-query attention gets fewer groups.

A mean of unrelated heads is a poor approximation, and the paper trains the model further. With `align` the pooled heads are
optimal and their readers are refitted: an attention computes Σ O_i softmax(…) V_i x and depends on its values only through the
products O_i V_i. With the heads of a group stacked,

    [O₁V₁; O₂V₂; …] C^½  ≈  [O₁'; O₂'; …] V̄ C^½                       C = E[x xᵀ], from calibration data; I without

is solved for the least squared error by a singular value decomposition, as a matrix of rank head_dim. The same is done for keys
with queries, [Q₁ᵀK₁; Q₂ᵀK₂; …], where nothing is between projections and attention: rotary embeddings and norms of queries and
keys fix their features, and such keys are averaged. A bias of keys adds the same to all scores of a query and is dropped.

With `regroup` heads are reordered first, in queries, keys, values and the output projection together, so that the heads of a
group lose least when pooled. The order of heads does not change the output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from lissom.compiler.analysis.amounts import Amounts, AmountSite, amounts_text, is_count, site_names
from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.calibration.statistics import Moments, moments
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.transforms.heads.key_value_heads import SeparateHeads, Separation, separated_heads
from lissom.errors import UnsupportedError
from lissom.passes.attention.pool_heads.factors import key_factors, projection_inputs, value_factors
from lissom.passes.attention.pool_heads.pooling import arranged


@dataclass(frozen=True)
class PoolHeads(Approximation):
    """Makes the key/value heads of each group equal, as grouped-query attention needs.

    Attributes:
        groups: number of distinct key/value heads to keep per attention; must divide their number.
        keep: fraction of key/value heads to keep in place of `groups`, rounded down to a divisor.
        amounts: key/value heads of single attentions, a divisor of their number or a fraction, by module path, with `*` and
            `?`: `"model.layers.0=2,*.5=none"`. Without `groups` and `keep`, other attentions stay as they are.
        align: refits the layers that read the heads, where possible; otherwise heads are averaged as they are.
        regroup: groups the heads that lose least when merged; otherwise neighbours.
        protect: module paths whose heads are all kept, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
    """

    groups: int | None = None
    keep: float | None = None
    align: bool = True
    regroup: bool = True
    protect: str = ""
    amounts: str = ""

    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if not self._amounts() and self.groups is None and self.keep is None:
            raise UnsupportedError(
                "pool-heads takes groups, a number of key/value heads, keep, a fraction of them, or amounts, numbers for "
                "single attentions; neither is given"
            )
        if self.groups is not None and self.keep is not None:
            raise UnsupportedError(
                "pool-heads takes groups, a number of key/value heads, or keep, a fraction of them; both are given"
            )
        if self.groups is not None and self.groups < 1:
            raise UnsupportedError(f"groups is {self.groups}; give 1 or more")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UnsupportedError(f"keep is {self.keep:g}; give a fraction above 0 and up to 1")

    def _amounts(self) -> Amounts:
        return Amounts.parse(self.amounts, "pool-heads{amounts=}", is_count)

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        with separated_heads(Editor(program.copy(), cls.name())) as separation:
            return list(dict(zip(_names(separation.heads), _sites(separation.heads), strict=True)).values())

    def run(self, edit: Editor) -> None:
        informed = edit.data and (self.align or self.regroup)
        known = moments(edit.program, edit.data, projection_inputs(edit.program)) if informed else {}
        with separated_heads(edit) as separation:
            chosen = self._chosen(edit, separation)
            for finished, (heads, groups) in enumerate(chosen):
                self._pool(edit, separation, heads, groups, known)
                edit.report("pool", finished + 1, len(chosen))

    def _chosen(self, edit: Editor, separation: Separation) -> list[tuple[SeparateHeads, int]]:
        """The attentions to pool, with the number of key/value heads each keeps.

        Raises:
            UnsupportedError: when the requested number divides the heads of none, or an amount those of its attention.
        """
        unprotected = [heads for heads in separation.heads if not is_path_protected(heads.site.path, self.protect)]
        given = self._amounts().counts(_sites(unprotected), "attentions with several key/value heads")
        rest = [heads.count for heads, amount in zip(unprotected, given, strict=True) if amount is None]
        left = [self._left(heads.count) if amount is None else amount for heads, amount in zip(unprotected, given, strict=True)]
        if rest and not any(self._left(count) for count in rest):
            counts = ", ".join(map(str, sorted(set(rest))))
            raise UnsupportedError(f"groups={self.groups} does not divide the key and value heads of any attention: {counts}")
        for heads, groups in zip(unprotected, left, strict=True):
            if not groups:
                edit.skip(heads.site.node, f"{self.groups} does not divide its {heads.count} key and value heads")
        if unprotected:
            counts = [groups or heads.count for heads, groups in zip(unprotected, left, strict=True)]
            text = amounts_text(_sites(unprotected), counts)
            edit.per_site = format_pass(replace(self, groups=None, keep=None, protect="", amounts=text))
        return [(heads, groups) for heads, groups in zip(unprotected, left, strict=True) if 0 < groups < heads.count]

    def _left(self, count: int) -> int:
        """The number of heads to keep of `count`; 0 where the requested number does not divide it."""
        if self.groups is not None:
            return count if self.groups > count else 0 if count % self.groups else self.groups
        if self.keep is None:
            return count
        return max(number for number in range(1, count + 1) if count % number == 0 and number <= max(1.0, self.keep * count))

    def _pool(
        self, edit: Editor, separation: Separation, heads: SeparateHeads, groups: int, known: Mapping[fx.Node, Moments]
    ) -> None:
        size = heads.count // groups
        factors = [find(edit.program, separation, heads) for find in (key_factors, value_factors)]
        products = [factor.products(edit.program, known, align=self.align) for factor in factors]
        reason = separation.order_obstacle(heads) if self.regroup else None
        if self.regroup and not reason:
            order = arranged(products, size)
            separation.reorder(heads, order)
            products = [factor.ordered(order) for factor in products]
        elif reason:
            edit.note(f"{heads.site.path}: neighbouring heads are pooled: {reason}")
        errors: list[str] = []
        for factor, product, name in zip(factors, products, ("keys", "values"), strict=True):
            pooled = [product.pooled(range(start, start + size)) for start in range(0, heads.count, size)]
            factor.write(edit, pooled, size, align=self.align)
            errors.append(f"{name} {(sum(head.error for head in pooled) / product.energy) ** 0.5:.2f}")
        edit.note(f"{heads.site.path}: {heads.count} heads are {groups}; relative error of {', '.join(errors)}")
        edit.rewritten += 1


def _names(attentions: Sequence[SeparateHeads]) -> list[str]:
    return site_names([heads.site.path for heads in attentions], [heads.keys.name for heads in attentions])


def _sites(attentions: Sequence[SeparateHeads]) -> list[AmountSite]:
    """The attentions as amounts name them: each takes the divisors of its number of key/value heads."""
    divisors = [tuple(number for number in range(1, heads.count + 1) if heads.count % number == 0) for heads in attentions]
    return [
        AmountSite("key/value heads", (name,), heads.count, {"pool-heads": legal})
        for name, heads, legal in zip(_names(attentions), attentions, divisors, strict=True)
    ]
