"""Measures the errors of a program's nodes when a report asks for them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import InputError, UnsupportedError
from lissom.frontends.capture.dynamic import Dynamic
from lissom.frontends.capture.export import capture
from lissom.frontends.models.adapters import with_merged_adapters
from lissom.inspect.node_errors import NodeErrors, measure_node_errors
from lissom.inspect.report import Report
from lissom.passes import RECIPES, known_passes


@dataclass
class OriginalMeter:
    """Compares a program with the model it was made of, captured anew, and keeps what it measured last.

    Attributes:
        model: what was compiled; it is not kept alive, as a large model's weights would be.
        args: the positional example inputs.
        kwargs: the keyword example inputs.
        dynamic: how it was captured.
        device: where it was captured.
        known: the last errors; None before the first.
    """

    program: Program
    history: History
    model: weakref.ref[nn.Module | Program]
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    dynamic: Dynamic | bool = True
    device: torch.device | None = None
    known: NodeErrors | None = None

    def measure(self, model: object = None) -> NodeErrors:
        """The errors beside the nodes of the model, in canonical form.

        Args:
            model: what was compiled; None if the caller still holds it.

        Raises:
            InputError: if the model is gone, or is another one.
            UnsupportedError: for a program that simulates ranks.
        """
        given = self.model() if model is None else model
        if given is None:
            raise InputError(f"the model that {self.program.name} was made of is gone; give it: report.errors(model)")
        if not isinstance(given, (nn.Module, Program)):
            raise InputError(f"model is a {type(given).__name__}; give the module or the program that was compiled")
        if self.program.is_simulation:
            raise UnsupportedError(f"{self.program.name} is partitioned, so its nodes have no counterparts in the original")
        vocabulary = self.program.vocabulary
        if vocabulary is not None and (vocabulary.ids == "tokenizer" or vocabulary.unknown is None):
            raise UnsupportedError(
                f"{self.program.name} does not take all token ids of the original after prune-vocabulary, so their errors "
                f"cannot be compared; measure the other passes without it"
            )
        original = self._canonical(given)
        for name in original.state:  # it shares the model's buffers, and so does the program
            original.set_weight(name, original.weight(name).clone())
        replaced = {
            name.removeprefix("%"): fact.origin.replaces
            for changes in self.history.changes.values()
            for name, fact in changes.items()
            if fact is not None and fact.origin.replaces
        }
        args, kwargs = self.args, self.kwargs
        if self.device is not None:
            args, kwargs = (pytree.tree_map(self._moved, given) for given in (args, kwargs))
        sample = self.program.signature.flatten(args, kwargs)
        self.known = measure_node_errors(original, self.program, sample, replaced)
        return self.known

    def _moved(self, value: object) -> object:
        """An input on the device of the program."""
        return value.to(self.device) if isinstance(value, torch.Tensor) else value

    def _canonical(self, model: nn.Module | Program) -> Program:
        """The model's program after the recipe `exact`, which is the first of every pipeline."""
        passes = parse_pipeline(RECIPES["exact"], known_passes())
        if isinstance(model, Program):
            program = model.copy()
        else:
            merged = with_merged_adapters(model)
            program = capture(merged, self.args, self.kwargs, dynamic=self.dynamic, device=self.device).program
        canonical, history = Pipeline(passes, checks="off").run(program)
        if history.texts[-1] != self.history.texts[min(len(passes), len(self.history.texts) - 1)]:
            raise InputError(f"the model given is not the one that {self.program.name} was made of: their programs differ")
        return canonical


def with_meter(
    report: Report,
    program: Program,
    model: nn.Module | Program,
    inputs: tuple[tuple[object, ...], Mapping[str, object]],
    *,
    dynamic: Dynamic | bool,
    device: torch.device | None,
) -> Report:
    """The report with what measures the errors of its program's nodes.

    Args:
        inputs: positional and keyword arguments.
    """
    args, kwargs = inputs
    meter = OriginalMeter(program, report.history, weakref.ref(model), args, kwargs, dynamic, device)
    return replace(report, meter=meter)
