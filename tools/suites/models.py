"""The check of one model: capture it, run the recipe `exact` with every pass checked, and compare with the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom.compiler.ir.samples import check_samples
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.verify.divergence import relative_error, tolerance_of
from lissom.errors import CaptureError, InputError, UnsupportedError
from lissom.frontends.capture.export import capture
from lissom.passes import PASSES, RECIPES
from tools.suites.suite import Record
from tools.zoo.check import sentence

Inputs = tuple[Sequence[object], Mapping[str, object]]
RESULTS = {
    "equal": "the program after the recipe `exact` returns what the model returns",
    "refused": "Lissom refuses the model and says why",
    "failure": "an error that is no refusal, or a check that fails",
    "wrong": "the program returns something else",
}
"""The results of `check_model` and their meaning."""


def check_model(model: nn.Module, inputs: Inputs, more: Sequence[Inputs] = ()) -> Record:
    """The result for a model in evaluation mode.

    inputs: the example. more: other inputs of the model; those that the program's signature refuses are left out.
    """
    record: Record = {"result": "equal"}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            captured = capture(model, *inputs)
        except (CaptureError, InputError, UnsupportedError) as error:
            return record | {"result": "refused", "reason": sentence(error)}
        except Exception as error:
            return record | {"result": "failure", "reason": f"capture: {sentence(error)}"}
        try:
            samples = check_samples(captured.program.signature, captured.example)
            program, history = Pipeline(parse_pipeline(RECIPES["exact"], PASSES), samples).run(captured.program)
            record |= {"dynamic": sorted(dimension.name for dimension in program.signature.dimensions.values())}
            record |= {"nodes": len(program.nodes()), "passes": sum(step.rewritten > 0 for step in history.steps)}
            worst = 0.0
            for index, (args, kwargs) in enumerate([inputs, *more]):
                try:
                    actual = program(*args, **kwargs)
                except InputError:
                    if index == 0:
                        raise
                    continue
                worst = max(worst, _error(copy.deepcopy(model)(*args, **kwargs), actual))
        except Exception as error:
            return record | {"result": "failure", "reason": f"the recipe `exact`: {sentence(error)}"}
        record["error_found"] = worst
        if worst > tolerance_of(program):
            record |= {"result": "wrong", "reason": f"differs by {worst:.2g} relative"}
    return record


def _error(wanted: object, actual: object) -> float:
    """The largest relative error of two results; infinite where their structures differ."""
    (left, spec), (right, other) = pytree.tree_flatten(wanted), pytree.tree_flatten(actual)
    if spec != other:
        return float("inf")
    return max(map(relative_error, left, right), default=0.0)
