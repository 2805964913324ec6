"""Writes a plan of `shard` as a JSON file that transformers takes as `distributed_config`, after running it on its ranks."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify.divergence import tolerance_of
from lissom.errors import UnsupportedError
from lissom.export.fresh_process import error_of
from lissom.export.tp_plan.ranks import run_ranks
from lissom.export.tp_plan.rules import rules_of
from lissom.io.files import check_writable, writing_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TpPlan:
    """A plan that was written.

    Attributes:
        plan: the style of each pattern of modules, for `DistributedConfig(tp_plan=...)` of transformers.
        world_size: the number of ranks.
        megabytes: of the parameters of the rank that holds the most.
        whole_megabytes: of the parameters of the model.
        relative_error: of the outputs of all ranks, to those of the model on one.
        notes: sentences on values that are gathered, and on layers that stay whole.
    """

    plan: Mapping[str, str]
    world_size: int
    megabytes: float
    whole_megabytes: float
    relative_error: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        ran = (
            f"{len(self.plan)} rules; run by transformers on {self.world_size} gloo ranks, each with {self.megabytes:.3g} of "
            f"{self.whole_megabytes:.3g} MB, its outputs differ by {self.relative_error:.1e} (relative) from one rank's"
        )
        return "; ".join((ran, *self.notes))


def write_tp_plan(program: Program, model: PreTrainedModel, example: Sample, path: Path) -> TpPlan:
    """Write the file, completely or not at all, after ranks of transformers have given the model's outputs.

    Args:
        program: after `shard`, captured from the model.
        example: flat inputs for the comparison.

    Raises:
        UnsupportedError: if nothing is sharded, or transformers cannot carry out the plan.
        ArtifactError: if the file cannot be written.
    """
    check_writable(path)
    _check_class(model)
    rules = rules_of(program, model, example)
    config = {"tp_size": rules.world_size, "tp_plan": dict(rules.plan)}
    whole, ranks = run_ranks(program, model, example, config)
    error = max(error_of(rank.outputs, whole.outputs) for rank in ranks)
    if not error <= (allowed := tolerance_of(program)):
        raise UnsupportedError(
            f"on {rules.world_size} ranks of transformers, {program.name} gives outputs that differ by {error:.2g} (relative), "
            f"and {allowed:.2g} is allowed, so the plan is not written"
        )
    with writing_whole(path) as file:
        file.write((json.dumps(config, indent=2) + "\n").encode())
    held = max(rank.parameter_bytes for rank in ranks)
    return TpPlan(rules.plan, rules.world_size, held / 1e6, whole.parameter_bytes / 1e6, error, rules.notes)


def _check_class(model: PreTrainedModel) -> None:
    """Refuse what fresh processes cannot run. Raises UnsupportedError."""
    transformers: Any = importlib.import_module("transformers")
    if getattr(transformers, type(model).__name__, None) is not type(model):
        raise UnsupportedError(
            f"{type(model).__name__} is no class of transformers, so fresh processes cannot load it on several ranks to compare"
        )
    if not torch.distributed.is_gloo_available():
        raise UnsupportedError("this PyTorch has no gloo, over which ranks would be compared with one rank")
