"""Cross-layer weight sharing: neighbouring transformer layers use one set of weights, which is stored once.

Layers of one stack that have the same weights, by name, shape and dtype, are split into groups of neighbours, and all layers of
a group read the weights of its first layer. A weight that only some layers have, such as the relative position table in the
first layer of T5, is not shared. The FLOPs stay; the model shrinks by the weights of the other layers. Lan et al. 2019, ALBERT,
§3.1, https://arxiv.org/abs/1909.11942, share weights during training; here they are tied afterwards, which has a large error,
so training should follow. The program trains as it is: a shared weight gets the sum of its gradients.

A group shares the mean of its layers' weights, or those of one layer. With calibration data and `take=auto` all choices are
tried, and the one with the least Σ‖f - f₀‖² / Σ‖f₀‖² is taken, where f are the program's outputs and f₀ those before the pass.
Groups are tied from first to last. Without data the mean is taken.

`skip` and `only` are patterns of the modules that hold the weights, so that `only="*.attention"` shares attentions only, as in
ALBERT, §4.5. Integer weights, such as position tables, are shared where they are equal; state is never shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import fx

from lissom.compiler.analysis.module_filter import is_path_protected
from lissom.compiler.analysis.structure.transformer import Layer, structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import FLOATING_POINT_WEIGHTS, Approximation
from lissom.errors import UnsupportedError

Values = Mapping[str, torch.Tensor]
"""The weights of a layer, by their names inside the layer."""


@dataclass(frozen=True)
class ShareLayers(Approximation):
    """Shares one set of weights among neighbouring layers of the same shape.

    Attributes:
        groups: number of groups of neighbours that each stack of layers is split into, 1 or more.
        every: number of neighbours that share weights, in place of `groups`; 2 or more.
        take: which weights are shared: the mean of the layers, or those of the first, middle or last; see above for `auto`.
        skip: module paths whose weights stay apart, with `*` and `?`, separated by commas: `"encoder.layer.0,*.norm"`.
        only: module paths whose weights are shared, in the same form; others stay apart.
    """

    groups: int | None = None
    every: int | None = None
    take: Literal["auto", "mean", "first", "middle", "last"] = "auto"
    skip: str = ""
    only: str = ""
    requires = (FLOATING_POINT_WEIGHTS,)

    def __post_init__(self) -> None:
        if (self.groups is None) == (self.every is None):
            raise UnsupportedError("share-layers takes exactly one of groups= and every=; groups=1 shares all, as ALBERT does")
        if self.groups is not None and self.groups < 1:
            raise UnsupportedError(f"share-layers takes groups= of 1 or more, not {self.groups}")
        if self.every is not None and self.every < 2:
            raise UnsupportedError(f"share-layers takes every= of 2 or more layers, not {self.every}")

    def run(self, edit: Editor) -> None:
        groups = self._groups(edit)
        wanted = _outputs(edit.program, edit.data)
        tied = 0
        for finished, group in enumerate(groups):
            edit.report("groups", finished, len(groups))
            description, values, error = self._choose(edit, group, wanted)
            _tie(edit, group, values)
            tied += len(group) - 1
            error_text = f"; relative error of outputs {error:.2g}" if edit.data else ""
            edit.note(f"{group[0].path} to {group[-1].path}: {len(group)} layers share {description}{error_text}")
        edit.rewritten = tied

    def _groups(self, edit: Editor) -> list[list[Held]]:
        """The groups to tie; layers without a neighbour to share with are reported as skipped."""
        layers = [self._held(edit.program, layer) for layer in edit.program.fact(structure).layers]
        groups: list[list[Held]] = []
        for stack in _stacks(layers):
            for group in self._grouped(stack):
                reason = _obstacle(group, stack)
                if reason is None:
                    groups.append(group)
                    continue
                for layer in group:
                    edit.skip(layer.place, reason)
        return groups

    def _grouped(self, layers: list[Held]) -> list[list[Held]]:
        if self.every is not None:
            return [layers[start : start + self.every] for start in range(0, len(layers), self.every)]
        count = min(self.groups or 1, len(layers))
        ends = [len(layers) * index // count for index in range(count + 1)]
        return [layers[start:end] for start, end in pairwise(ends)]

    def _held(self, program: Program, layer: Layer) -> Held:
        """The weights of a layer that may be shared."""
        reads: dict[str, list[fx.Node]] = {}
        for node in program:
            name = str(node.target)
            module = name.rpartition(".")[0]
            if node.op != "get_attr" or not f"{module}.".startswith(f"{layer.path}.") or name in program.state:
                continue
            if is_path_protected(module, self.skip) or (self.only and not is_path_protected(module, self.only)):
                continue
            reads.setdefault(name.removeprefix(f"{layer.path}."), []).append(node)
        place = layer.attention[0].node if layer.attention else layer.feed_forward[0].down
        return Held(layer.path, place, reads)

    def _choose(self, edit: Editor, group: Sequence[Held], wanted: Sequence[object]) -> tuple[str, Values, float]:
        """The weights that a group shares, their description, and the relative error of the outputs with them."""
        held = [
            {key: edit.program.weight(str(reads[0].target)).detach() for key, reads in layer.reads.items()} for layer in group
        ]
        choices: dict[str, Callable[[], Values]] = {"their mean": lambda: mean(held)}
        choices |= {
            f"the weights of {layer.path}": lambda values=values: values for layer, values in zip(group, held, strict=True)
        }
        names = list(choices)
        if self.take != "auto":
            index = {"mean": 0, "first": 1, "middle": 1 + len(group) // 2, "last": len(group)}[self.take]
            names = names[index : index + 1]
        if not edit.data:
            return names[0], choices[names[0]](), 0.0
        errors = {name: _error(edit, group, choices[name](), wanted) for name in names}
        best = min(names, key=errors.__getitem__)
        return best, choices[best](), errors[best]


@dataclass(frozen=True)
class Held:
    """A layer and the reads of its weights, by their names inside the layer.

    Attributes:
        place: one of its nodes, for reports.
    """

    path: str
    place: fx.Node
    reads: Mapping[str, list[fx.Node]]

    @property
    def stack(self) -> str:
        """The path of the stack that the layer belongs to."""
        return self.path.rpartition(".")[0]

    @property
    def form(self) -> set[tuple[str, object]]:
        """Names and types of the weights."""
        return {(key, nodes.tensor_type(reads[0])) for key, reads in self.reads.items()}


def _stacks(layers: Sequence[Held]) -> list[list[Held]]:
    """Runs of neighbours in one stack, with the weights they have in common."""
    stacks: list[list[Held]] = []
    common: set[tuple[str, object]] = set()
    for layer in layers:
        form = layer.form
        if stacks and stacks[-1][0].stack == layer.stack and (form <= common or common <= form):
            common &= form
            stacks[-1].append(layer)
        else:
            common = set(form)
            stacks.append([layer])
    for stack in stacks:
        keys = {key for key, _ in set.intersection(*(layer.form for layer in stack))}
        stack[:] = [replace(layer, reads={key: layer.reads[key] for key in layer.reads if key in keys}) for layer in stack]
    return stacks


def _obstacle(group: Sequence[Held], stack: Sequence[Held]) -> str | None:
    """The reason the layers of a group share no weights; None if they can."""
    if not group[0].reads:
        return "none of its weights are to be shared"
    if len(stack) == 1:
        return "it has no neighbour with weights of the same shapes"
    if len(group) == 1:
        return "its group has one layer"
    return None


def mean(layers: Sequence[Values]) -> Values:
    """The mean of each weight over the layers; for integer weights the first."""
    means: dict[str, torch.Tensor] = {}
    for key, first in layers[0].items():
        total = torch.stack([layer[key].double() for layer in layers]).mean(0) if first.is_floating_point() else first
        means[key] = total.to(first.dtype)
    return means


def _tie(edit: Editor, group: Sequence[Held], values: Values) -> None:
    """Let all layers of a group read the weights of the first, set to these values."""
    for key, value in values.items():
        others = [node for layer in group[1:] for node in layer.reads[key]]
        keeper = group[0].reads[key][0]
        if not value.is_floating_point() and any(
            not torch.equal(edit.program.weight(str(node.target)), value) for node in others
        ):
            continue
        for node in others:
            edit.replace(node, keeper)
        if value.is_floating_point():
            for node in group[0].reads[key]:
                edit.set_weight(node, value.clone())


def _error(edit: Editor, group: Sequence[Held], values: Values, wanted: Sequence[object]) -> float:
    """The relative error of the outputs when all layers of a group have these weights."""
    trial = edit.program.copy()
    for layer in group:
        for key, reads in layer.reads.items():
            if values[key].is_floating_point():
                trial.set_weight(str(reads[0].target), values[key])
    return _divergence(wanted, _outputs(trial, edit.data))


def _outputs(program: Program, data: Sequence[Sample]) -> list[object]:
    with torch.no_grad(), kept_state(program):
        return [value for sample in data for value in program.run(sample)]


def _divergence(wanted: Sequence[object], actual: Sequence[object]) -> float:
    """‖f - f₀‖ / ‖f₀‖ over all floating-point outputs of all samples."""
    missed, total = 0.0, 0.0
    for a, b in zip(wanted, actual, strict=True):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.is_floating_point():
            missed += float((a.double() - b.double()).square().sum())
            total += float(a.double().square().sum())
    return (missed / max(total, 1e-300)) ** 0.5
