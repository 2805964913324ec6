"""Remove the layers that change the residual stream least, whole or only their attention or feed-forward.

    influence = 1 − E[cos(x, y)]     x, y: the residual stream of one token before and after

- `influence` needs calibration data; padding is left out. Men et al. 2024, ShortGPT: Layers in Large Language Models are More
  Redundant Than You Expect, equation 1. https://arxiv.org/abs/2403.03853 All layers are measured once, in the unpruned program.
- `magnitude` needs none: the Frobenius norm of the last matrices of the layer's branches, which bounds their outputs. It is
  weaker, because it ignores the activations.
- `linear-fit` needs calibration data: the layers whose part a linear map could play best, see `linear_fit`. Where training
  follows, the others take that part over. Without training `influence` loses less.

How a layer is removed depends on where its norms are. Pre-norm, y = x + f(norm(x)): weight and bias of the last layer of
each branch are set to zero, so that y = x, and `eliminate-dead`, which runs right after it, removes the branch. Post-norm,
y = norm(x + f(x)), as in BERT: with f = 0 the norm would still change the stream, so this pass itself bypasses the layer with
its norms, y = x. It also bypasses layers with shared weights, as in ALBERT, and layers whose branch ends in a norm with a bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.amounts import Amounts, AmountSite, Legal
from lissom.compiler.analysis.axes.zeros import is_zero, zeros
from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.analysis.structure.branches import Branch, branch_of, follow, joined
from lissom.compiler.analysis.structure.linear import weight_of, weight_path
from lissom.compiler.analysis.structure.transformer import Layer, structure
from lissom.compiler.calibration.statistics import observe
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.interpreter import evaluate_nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import format_pass
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes.prune.prune_layers.linear_fit import most_linear

_KEEP = 0.75
_WHAT = {"layer": "layers", "attention": "attentions", "feed-forward": "feed-forwards"}


@dataclass(frozen=True)
class PruneLayers(Approximation):
    """Removes the layers that change the residual stream least.

    Attributes:
        keep: fraction of layers to keep, above 0 and below 1, rounded to whole layers; of those that `amounts` does not name.
            0.75 where neither is given.
        amounts: which layers go, by module path, with `*` and `?`: 0 removes a layer, 1 keeps it, `"encoder.layer.3=0,*.5=0"`.
            It needs no data. Without `keep`, other layers stay.
        part: what is removed: whole layers, or only their `attention` or `feed-forward`.
        criterion: how layers are chosen; `influence` and `linear-fit` need calibration data. `linear-fit` is for layers whose
            part the others learn in a training pass that follows.
        protect: module paths of layers to keep, with `*` and `?`, separated by commas: `"encoder.layer.0,*.11"`.
    """

    keep: float | None = None
    part: Literal["layer", "attention", "feed-forward"] = "layer"
    criterion: Literal["influence", "magnitude", "linear-fit"] = "influence"
    protect: str = ""
    amounts: str = ""

    leaves_dead = True

    def __post_init__(self) -> None:
        self._amounts()
        if self.keep is not None and not 0 < self.keep < 1:
            raise UnsupportedError(f"prune-layers keeps a fraction of the layers above 0 and below 1, not keep={self.keep:g}")

    @classmethod
    def sites(cls, program: Program) -> Sequence[AmountSite]:
        by_part: dict[str, dict[str, Legal]] = {}
        for pass_ in (cls(), cls(part="attention"), cls(part="feed-forward")):
            for name, unit in pass_._layers(program).items():
                if not isinstance(unit, str):
                    by_part.setdefault(name, {})[format_pass(pass_)] = (0, 1)
        return [AmountSite("layer", (name,), 1, takes) for name, takes in by_part.items()]

    def run(self, edit: Editor) -> None:
        layers = self._layers(edit.program)
        staying = {name: unit for name, unit in layers.items() if isinstance(unit, str)}
        staying |= {name: "it is protected" for name in layers if is_path_protected(name.partition(" ")[0], self.protect)}
        chosen, rest = self._named(layers, staying)
        if self.keep is not None or not self.amounts:
            units = {name: unit for name, unit in rest.items() if name not in staying and not isinstance(unit, str)}
            if len(rest) == 1:
                edit.note(f"the only one of its {_WHAT[self.part]} stays")
                return
            count = self._count(len(rest), {name: reason for name, reason in staying.items() if name in rest})
            chosen += self._least_needed(edit, units, count)
        gone = [name for name in layers if name in chosen]
        if gone:
            text = ",".join(f"{name}=0" for name in gone)
            edit.per_site = format_pass(replace(self, keep=None, amounts=text, criterion="influence", protect=""))
        _remove(edit, [branch for name in gone for branch in layers[name] if isinstance(branch, Branch)])

    def _amounts(self) -> Amounts:
        takes = "0 for a layer that goes, 1 for one that stays, or none"
        return Amounts.parse(self.amounts, "prune-layers{amounts=}", lambda amount: amount in ("0", "1"), takes)

    def _layers(self, program: Program) -> dict[str, list[Branch] | str]:
        """The layers of the program, each with its branches, or why it cannot be removed."""
        units: dict[str, list[Branch] | str] = {}
        layers = program.fact(structure).layers
        # A head of two linear layers, such as a pooler, is a feed-forward but adds to no residual stream.
        in_stream = [layer for layer in layers if any(site.residual for site in (*layer.attention, *layer.feed_forward))]
        for layer in in_stream or layers:
            units |= _units(program, layer, self.part)
        return units

    def _named(
        self, layers: Mapping[str, list[Branch] | str], staying: Mapping[str, str]
    ) -> tuple[list[str], dict[str, list[Branch] | str]]:
        """The layers that `amounts` removes, and those that it does not name.

        Raises:
            UnsupportedError: when one of them cannot be removed.
        """
        sites = [AmountSite("layer", (name,), 1, {"prune-layers": (0, 1)}) for name in layers]
        given = dict(zip(layers, self._amounts().counts(sites, _WHAT[self.part]), strict=True))
        gone = [name for name, amount in given.items() if amount == 0]
        for name in gone:
            if name in staying:
                raise UnsupportedError(f"prune-layers{{amounts=}}: '{name}' cannot go: {staying[name]}; leave it out")
        if len(gone) == len(layers) > 0:
            raise UnsupportedError(f"prune-layers{{amounts=}} removes all {len(layers)} {_WHAT[self.part]}; one has to stay")
        return gone, {name: unit for name, unit in layers.items() if given[name] is None}

    def _count(self, layers: int, staying: dict[str, str]) -> int:
        """The number of layers to remove.

        Raises:
            UnsupportedError: when that many cannot be removed.
        """
        what, keep = _WHAT[self.part], _KEEP if self.keep is None else self.keep
        count = layers - max(1, round(keep * layers))
        if not layers:
            raise UnsupportedError(f"prune-layers finds no {what} in this program, so none can go")
        if count == 0:
            possible = f"keep={(layers - 1) / layers:.2g} removes one" if layers > 1 else "one has to stay"
            raise UnsupportedError(f"prune-layers{{keep={keep:g}}} removes none of {layers} {what}, rounded; {possible}")
        if count > layers - len(staying):
            (path, reason), more = next(iter(staying.items())), len(staying) - 1
            also = f", and {more} more stay too" if more else ""
            possible = f"keep={len(staying) / layers:.2g} or more is possible" if len(staying) < layers else "none can go"
            raise UnsupportedError(
                f"prune-layers{{keep={keep:g}}} has to remove {count} of {layers} {what}, but '{path}' cannot go: "
                f"{reason}{also}; {possible}"
            )
        return count

    def _least_needed(self, edit: Editor, units: dict[str, list[Branch]], count: int) -> list[str]:
        """The names of the layers to remove."""
        if self.criterion != "magnitude" and not edit.data:
            raise RequirementError(
                f"prune-layers{{criterion={self.criterion}}} needs calibration data: pass data=, or choose criterion=magnitude"
            )
        if self.criterion == "linear-fit":
            return most_linear(edit, units, count)
        scores = self._scores(edit, units)
        return sorted(units, key=scores.__getitem__)[:count]

    def _scores(self, edit: Editor, units: dict[str, list[Branch]]) -> dict[str, float]:
        if self.criterion == "magnitude":
            # The Frobenius norm of the last matrices of all branches together.
            weights = {path: [_values(edit.program, branch.last) for branch in unit] for path, unit in units.items()}
            return {
                path: sum(float(weight.square().sum()) for weight in read if weight is not None) ** 0.5
                for path, read in weights.items()
            }
        return _influences(edit, units)


def _values(program: Program, layer: fx.Node) -> torch.Tensor | None:
    """The numbers of a layer's weight, those of stored integers too; None where it is computed from inputs."""
    path = weight_path(layer)
    return evaluate_nodes(program.graph_module, path[0]).float() if path and path[-1].op == "get_attr" else None


def _units(program: Program, layer: Layer, part: str) -> dict[str, list[Branch] | str]:
    """The branches to remove together, in order, or why they cannot be removed; empty where the layer has none of that kind.

    A layer that is called several times, as in ALBERT, counts once per call: `layers.0`, `layers.0 (call 2)`.
    """
    branches = _branches(program, layer, part)
    if isinstance(branches, str):
        return {layer.path: branches}
    calls: list[list[Branch]] = []
    for branch in branches:
        if not calls or any(weight_of(branch.last) is weight_of(other.last) for other in calls[-1]):
            calls.append([])
        calls[-1].append(branch)
    names = [layer.path, *(f"{layer.path} (call {index})" for index in range(2, len(calls) + 1))]
    return {name: _obstacle(call) or call for name, call in zip(names, calls, strict=False)}


def _obstacle(call: Sequence[Branch]) -> str | None:
    """The reason a layer cannot be removed; None if it can."""
    if not follow(call):
        return "between its parts something else changes the residual stream"
    if nodes.node_type(call[0].before) != nodes.node_type(call[-1].after):
        return "the residual stream has another type after it"
    return None


def _branches(program: Program, layer: Layer, part: str) -> list[Branch] | str:
    """The branches of a layer in order, or why they cannot be found."""
    sites = [*(layer.attention if part != "feed-forward" else ()), *(layer.feed_forward if part != "attention" else ())]
    mixtures = [site.path for site in program.fact(structure).mixtures]
    if part != "attention" and any(f"{path}.".startswith(f"{layer.path}.") for path in mixtures):
        return "it holds a mixture of experts, which has no one branch"
    branches: list[Branch] = []
    for site in sites:
        branch = branch_of(site)
        if isinstance(branch, str):
            return branch
        if nodes.node_type(branch.before) != nodes.node_type(branch.after):
            return "the residual stream has another type after it"
        branches.append(branch)
    return joined(sorted(branches, key=lambda branch: branch.total))


def _influences(edit: Editor, units: dict[str, list[Branch]]) -> dict[str, float]:
    """1 − the mean cosine of the residual stream before and after each unit, over real tokens."""
    cosines, counts = dict.fromkeys(units, 0.0), dict.fromkeys(units, 0)
    seen: dict[fx.Node, torch.Tensor] = {}

    def visit(node: fx.Node, rows: torch.Tensor) -> None:
        seen[node] = rows.float()
        for path, unit in units.items():
            if unit[-1].after is node:
                cosines[path] += float(torch.cosine_similarity(seen[unit[0].before], seen[node], -1).sum())
                counts[path] += len(rows)

    observe(edit.program, edit.data, {node for unit in units.values() for node in (unit[0].before, unit[-1].after)}, visit)
    return {path: 1 - cosines[path] / max(1, counts[path]) for path in units}


def _remove(edit: Editor, branches: Sequence[Branch]) -> None:
    """Remove branches, given in order: by zeros in their last layers where that is enough, else by bypassing them."""
    zeroed = {branch: read for branch in branches if not branch.post_norm and (read := _own_weights(edit, branch))}
    for weight, tensor in (pair for read in zeroed.values() for pair in read):
        edit.set_weight(weight, torch.zeros_like(tensor))
    zero = edit.program.fact(zeros) if zeroed else {}
    dead = [branch for branch in zeroed if is_zero(zero, branch.addend)]
    edit.rewritten += len(dead)
    for branch in reversed([branch for branch in branches if branch not in dead]):
        for weight, tensor in zeroed.get(branch, ()):
            edit.set_weight(weight, tensor)
        if not branch.post_norm and not branch.total._erased:
            edit.replace(branch.total, branch.rest)
        elif not branch.after._erased:
            edit.replace(branch.after, branch.before)


def _own_weights(edit: Editor, branch: Branch) -> list[tuple[fx.Node, torch.Tensor]]:
    """Weight and bias of a branch's last layer, with their values; empty where they have other readers."""
    weight = weight_of(branch.last)
    assert weight is not None, "a branch ends in a linear layer"
    read = dict.fromkeys([weight, *(parameter for parameter in branch.last.all_input_nodes if parameter.op == "get_attr")])
    if any(len(parameter.users) > 1 for parameter in read):
        return []
    return [(parameter, edit.tensor(parameter)) for parameter in read]
