"""What tests of pruning share: canonical programs with structure that is dead."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lissom.compiler.analysis.axes.columns import find_head_columns, find_neuron_columns
from lissom.compiler.analysis.structure.transformer import Structure, structure
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.compiler.verify.divergence import compare, run_samples, tolerance_of, with_kept_form
from tests.support.canonical_programs import programs_of, run_passes
from tests.support.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}
program_of = programs_of(MODELS)


def sites_of(program: Program) -> Structure:
    return program.fact(structure)


def zero_heads(program: Program, index: int, heads: Iterable[int]) -> None:
    """Zero the columns that read these heads of the attention of that number."""
    columns = find_head_columns(program, sites_of(program).attention[index])
    weight = program.weight(str(columns.weight.target))
    Editor(program, "mask").set_weight(columns.weight, columns.zeroed(weight, heads))


def zero_neurons(program: Program, index: int, neurons: Iterable[int]) -> None:
    """Zero the columns that read these neurons of the feed-forward of that number."""
    columns = find_neuron_columns(program, sites_of(program).feed_forward[index])
    weight = program.weight(str(columns.weight.target))
    Editor(program, "mask").set_weight(columns.weight, columns.zeroed(weight, neurons))


def zero_bias(program: Program, layer: torch.fx.Node) -> None:
    """Zero the bias of a linear layer."""
    bias = layer.args[0] if layer.target is torch.ops.aten.addmm.default else layer.args[2]
    Editor(program, "mask").set_weight(bias, torch.zeros_like(program.weight(str(bias.target))))


def eliminate(passes: str, program: Program, samples: list[Sample]) -> tuple[Program, History]:
    """The program after these passes, compared with the one before at two sizes."""
    after, history = run_passes(passes, program, samples)
    with torch.no_grad():
        runs = [with_kept_form(program, after, run_samples(item, samples)) for item in (program, after)]
        error = compare(*runs).relative_error
    # What was removed were exact zeros; what is left is summed in another order.
    assert error <= tolerance_of(program)
    return after, history
