"""The rules of a plan for transformers, from the placements that `shard` gave the weights.

transformers replaces the numbers of layers in a module's name by `*` and has one style for each such pattern. `colwise` and
`rowwise` keep the values between two linear layers sharded, so the model's own forward has to work on a rank's part of them.
Where it does not, the layers are sharded with whole inputs and outputs: `colwise_gather_output` and `rowwise_split_input`. The
styles are in transformers/distributed/tensor_parallel.py.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.placement import Placed, Spans
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.ir.types import fixed
from lissom.compiler.parallel.partitioned_program import PartitionedProgram
from lissom.compiler.parallel.sites import linear_weights
from lissom.errors import UnsupportedError
from lissom.frontends.capture.kv_cache import without_kv_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_GATHERED = {
    ("Linear", "columns"): "colwise_gather_output",
    ("Linear", "rows"): "rowwise_split_input",
    # Both styles compute with DTensors, which know the whole shape; those of linear layers ask for `out_features`.
    ("Conv1D", "columns"): "embedding_colwise",
    ("Conv1D", "rows"): "embedding_rowwise",
    ("Embedding", "columns"): "embedding_colwise",
    ("Embedding", "rows"): "embedding_rowwise",
}
"""The styles with whole inputs and outputs, by the class of the layer and the side of its weight that is sharded."""


@dataclass(frozen=True)
class Rules:
    """The rules for one model.

    Attributes:
        plan: the style of each pattern of module names, or of parameter names.
        world_size: the number of ranks that `shard` planned for.
        notes: sentences on values that are gathered, and on layers that stay whole.
    """

    plan: Mapping[str, str]
    world_size: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Shard:
    """A weight of the model that `shard` sharded.

    Attributes:
        path: of its module.
        name: in the module.
        spans: of the sharded dimension, `dim`.
    """

    path: str
    name: str
    module: nn.Module
    dim: int
    spans: Spans

    @property
    def layer(self) -> str:
        """`Linear`, `Conv1D`, `Embedding`, or the name of another class, for which there is no style."""
        known = zip(("Linear", "Conv1D", "Embedding"), (*_layers(), nn.Embedding), strict=True)
        fits = (name for name, kind in known if isinstance(self.module, kind) and self.name == "weight")
        return next(fits, type(self.module).__name__)

    @property
    def side(self) -> str:
        """`columns` if a rank has some of the layer's output features, `rows` if it has some inputs, or some of the ids."""
        return "columns" if self.dim == (0 if self.layer == "Linear" else 1) else "rows"

    @property
    def is_supported(self) -> bool:
        return (self.layer, self.side) in _GATHERED

    @property
    def parts(self) -> int:
        """The number of tensors that are packed into the weight."""
        return sum(fixed(span.outer) for span in self.spans)

    def of_rank_0(self) -> dict[str, torch.Tensor]:
        """The parameters of the module that are sharded, as rank 0 has them, by their names in the model."""
        starts = [sum(fixed(span.whole) for span in self.spans[:index]) for index in range(len(self.spans))]
        rows = torch.cat([span.indices(0, start) for span, start in zip(self.spans, starts, strict=True)])
        weight = self.module.get_parameter(self.name)
        parts = {f"{self.path}.{self.name}": weight.index_select(self.dim, rows.to(weight.device))}
        if self.side == "columns" and isinstance(bias := getattr(self.module, "bias", None), nn.Parameter):
            parts[f"{self.path}.bias"] = bias.index_select(0, rows.to(bias.device))
        return parts


def rules_of(program: Program, model: PreTrainedModel, example: Sample) -> Rules:
    """The rules that carry out the placements of a program in the modules of its model.

    Args:
        program: after `shard`, and not partitioned.
        example: flat inputs, to try which layers work on a rank's part.

    Raises:
        UnsupportedError: if nothing is sharded, the program is partitioned, or its weights are not the model's.
    """
    placed = _placements(program)
    world_size = max((span.parts * span.every for _, (_, spans) in placed.values() for span in spans), default=1)
    groups, notes = _groups(_shards(program, placed, model), model)
    plan: dict[str, str] = {}
    for group in groups:
        sides = {shard.side for shard in group if shard.layer in ("Linear", "Conv1D")}
        is_pair = sides == {"columns", "rows"}
        obstacle = (_obstacle(group, world_size) or _failure(program, model, example, group)) if is_pair else None
        if obstacle is not None:
            notes.append(f"values inside '{_common(group)}' are gathered, because {obstacle}")
        for shard in group:
            if shard.is_supported:
                plan |= _styles(shard, is_pair and obstacle is None)
            else:
                notes.append(f"'{shard.path}' stays whole: transformers has no style for {shard.layer}")
    if not plan:
        why = "; ".join(dict.fromkeys(notes)) or "shard found nothing to shard in it"
        raise UnsupportedError(f"{program.name} has no plan of tensor parallelism: {why}")
    plan |= _tied(plan, model)
    return Rules(dict(sorted(plan.items())), world_size, tuple(dict.fromkeys(notes)))


def pattern_of(name: str) -> str:
    """The name as plans of transformers have it: numbers of layers are `*`."""
    return _NUMBER.sub(".*", name)


def _layers() -> tuple[type[nn.Module], type[nn.Module]]:
    """The classes of linear layers."""
    return nn.Linear, importlib.import_module("transformers.pytorch_utils").Conv1D


def _placements(program: Program) -> dict[str, tuple[int, tuple[int, Spans]]]:
    """The site of each sharded weight, and its sharded dimension. Raises UnsupportedError without a plan of `shard`."""
    if isinstance(program, PartitionedProgram):
        raise UnsupportedError(f"{program.name} is partitioned already; leave partition out of the passes")
    weights = [node for node in program.graph.nodes if node.op == "get_attr"]
    placements = {str(node.target): nodes.placed(node) for node in weights}
    if None in placements.values() or not placements:
        raise UnsupportedError(f"{program.name} has no placements on ranks; end the passes with shard{{world_size=2}}")
    sharded = {name: placed for name, placed in placements.items() if isinstance(placed, Placed) and placed.is_sharded}
    return {name: (placed.dims[0][1][0].site, placed.dims[0]) for name, placed in sharded.items()}


def _shards(
    program: Program, placed: Mapping[str, tuple[int, tuple[int, Spans]]], model: PreTrainedModel
) -> list[list[_Shard]]:
    """The sharded weights of each site, at every module that has them. Raises UnsupportedError for weights of other models."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((path, name, module))
    weights, linear = program.weights(), {str(weight.target) for weight in linear_weights(program)}
    layers = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, (*_layers(), nn.Embedding)))
    sites: dict[int, list[_Shard]] = {}
    for target, (site, (dim, spans)) in placed.items():
        parameter = parameters.get(target)
        # The model computes other constants itself, such as the slopes of heads, for as many heads as its configuration has.
        if parameter is None and target not in linear and not target.startswith(layers):
            continue
        if parameter is None or parameter.shape != weights[target].shape:
            raise UnsupportedError(
                f"the passes changed '{target}' of {program.name}, and a plan is for the model's own weights; save the model "
                f"with save_pretrained, load it, and run shard alone"
            )
        held = [_Shard(path, name, module, dim, spans) for path, name, module in owners[id(parameter)]]
        # The rule for a layer's weight is that for its bias.
        if not any(shard.name == "bias" and isinstance(shard.module, _layers()) for shard in held):
            sites.setdefault(site, []).extend(held)
    return [shards for shards in sites.values() if any(shard.is_supported for shard in shards)]


def _groups(sites: Sequence[Sequence[_Shard]], model: PreTrainedModel) -> tuple[list[list[_Shard]], list[str]]:
    """The weights that have to be sharded together, and notes on those that stay whole.

    Sites with a pattern in common are one group. A group stays whole if one of its patterns would be for other layers too.
    """
    groups: list[list[_Shard]] = []
    for site in sites:
        patterns = {pattern_of(shard.path) for shard in site}
        shared = [group for group in groups if any(pattern_of(shard.path) in patterns for shard in group)]
        groups = [group for group in groups if group not in shared]
        groups.append([*site, *(shard for group in shared for shard in group)])
    modules: dict[str, set[str]] = {}
    for path, _ in model.named_modules():
        modules.setdefault(pattern_of(path), set()).add(path)
    kept, notes = list[list[_Shard]](), list[str]()
    for group in groups:
        sides: dict[str, set[str]] = {}
        sharded = {shard.path for shard in group}
        for shard in group:
            sides.setdefault(pattern_of(shard.path), set()).add(shard.side)
        mixed = next((pattern for pattern in sides if len(sides[pattern]) > 1 or not modules[pattern] <= sharded), None)
        if mixed is None:
            kept.append(group)
        else:
            notes.append(f"'{_common(group)}' stays whole, because transformers has one rule for all layers '{mixed}'")
    return kept, notes


def _obstacle(group: Sequence[_Shard], world_size: int) -> str | None:
    """Why no styles of transformers keep values between these layers sharded; None if there are some."""
    for shard in group:
        if not shard.is_supported or shard.layer == "Conv1D":
            return f"transformers has no style for parts of {shard.layer}"
        if shard.layer == "Embedding" and shard.side == "rows":
            return f"'{shard.path}' is an embedding table"
        for span in shard.spans:
            if span.parts * span.every != world_size or span.every > 1 or fixed(span.size) % world_size:
                return f"an axis of {span.size} does not divide by {world_size} ranks"
        has_bias = getattr(shard.module, "bias", None) is not None
        if shard.parts > 2 or (shard.parts == 2 and (has_bias or shard.side == "rows")):
            with_bias = " with a bias" if has_bias else ""
            return f"transformers has no style for {shard.parts} packed weights{with_bias}"
    return None


def _failure(program: Program, model: PreTrainedModel, example: Sample, group: Sequence[_Shard]) -> str | None:
    """The error of the model's forward with rank 0's part of these layers; None if it runs."""
    parts = {name: part for shard in group for name, part in shard.of_rank_0().items()}
    args, kwargs = program.signature.arguments(example)
    try:
        with torch.no_grad(), without_kv_cache(model):
            torch.func.functional_call(model, parts, tuple(args), dict(kwargs))
    except (RuntimeError, ValueError) as error:
        return f"the model's forward fails on a part of them: {str(error).splitlines()[0]:.200}"
    return None


def _styles(shard: _Shard, is_local: bool) -> dict[str, str]:
    """The rules of a layer, whose values to its partner stay sharded if `is_local`."""
    pattern = pattern_of(shard.path)
    if shard.layer == "Conv1D":
        # For a parameter, `colwise` shards the only dimension of a bias, and `rowwise` gives every rank the whole bias.
        bias = "colwise" if shard.side == "columns" else "rowwise"
        return {pattern: _GATHERED[shard.layer, shard.side], f"{pattern}.bias": bias}
    if not is_local:
        return {pattern: _GATHERED[shard.layer, shard.side]}
    if shard.layer == "Embedding":
        # `rowwise` shards the last dimension of a parameter, the heads of a relative attention bias.
        return {f"{pattern}.{shard.name}": "rowwise", pattern: "local_params"}
    if shard.side == "rows":
        return {pattern: "rowwise"}
    return {pattern: "packed_colwise" if shard.parts == 2 else "colwise"}


def _tied(plan: Mapping[str, str], model: PreTrainedModel) -> dict[str, str]:
    """Rules for biases of column-wise layers that other modules hold too, such as that of a head for masked tokens."""
    layers = {path: module for path, module in model.named_modules() if "colwise" in plan.get(pattern_of(path), "")}
    biases = {id(bias) for module in layers.values() if (bias := getattr(module, "bias", None)) is not None}
    return {
        pattern_of(name): "colwise"
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in biases and name.rpartition(".")[0] not in layers
    }


def _common(group: Sequence[_Shard]) -> str:
    """The longest path that the patterns of a group share."""
    paths = [pattern_of(shard.path).split(".") for shard in group]
    length = 0
    while all(len(path) > length for path in paths) and len({path[length] for path in paths}) == 1:
        length += 1
    return ".".join(paths[0][:length]) or pattern_of(group[0].path)
