"""The time of every operator of a program, run one by one as the eager backend calls them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from lissom.backends.eager.methods import METHODS
from lissom.compiler.ir.interpreter import last_uses_of
from lissom.compiler.ir.program import Program
from lissom.measure.timing import time_once, time_runs
from lissom.ops import KERNELS
from lissom.ops.native import load_kernels, one_call

_FEWEST_RUNS, _WARM_UPS = 5, 2


def time_nodes(program: Program, inputs: Sequence[torch.Tensor], seconds: float) -> dict[fx.Node, float]:
    """Milliseconds of every call node, run in order: medians of all runs within `seconds`, at least five.

    The program's state is copied, and the copy goes from one run to the next.
    """
    milliseconds: dict[fx.Node, list[float]] = {node: [] for node in program.nodes()}
    weights = {name: tensor.detach() for name, tensor in program.weights().items()}
    weights |= {name: weights[name].clone() for name in program.state}
    run = one_call(_run) if program.nodes(*KERNELS) and not load_kernels() else _run
    with torch.inference_mode():
        call = partial(run, program, inputs, weights, milliseconds)
        time_runs({"program": call}, seconds, least=_FEWEST_RUNS, warm_ups=_WARM_UPS)
    return {node: statistics.median(runs[_WARM_UPS:]) for node, runs in milliseconds.items()}


def _run(
    program: Program,
    inputs: Sequence[torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    milliseconds: Mapping[fx.Node, list[float]],
) -> None:
    values: dict[fx.Node, Any] = dict(zip(program.placeholders, inputs, strict=True))
    frees = last_uses_of(program.graph)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            values[node] = weights[str(node.target)]
        elif node.op == "call_function":
            target: Any = METHODS.get(node.target, node.target)
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            spent, values[node] = time_once(partial(target, *args, **kwargs))
            milliseconds[node].append(spent)
            del args, kwargs
        for used in frees.get(node, ()):
            del values[used]
