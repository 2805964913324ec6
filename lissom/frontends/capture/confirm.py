"""Checks of a captured program against its model, on the example inputs and at other sizes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom.compiler.analysis.cost import flops
from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample, few_rows, varied_samples
from lissom.compiler.paging import is_paged
from lissom.compiler.verify.divergence import output_errors, run_samples, tolerances
from lissom.errors import CaptureError
from lissom.frontends.capture.failures import describe_failure
from lissom.frontends.capture.kv_cache import ReturnedCacheError, is_kv_cache_object
from lissom.frontends.capture.layers_alike import compare_alike
from lissom.frontends.capture.untouched import nothing_registered, untouched


class RefusedSizesError(CaptureError):
    """The model, or the bounds found during capture, refuse every size tried other than the example's."""


def answer_to(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[object]:
    """The model's flat outputs for copies of the example inputs. Its buffers are restored.

    Raises:
        CaptureError: if the model itself fails, with its error, or returns anything but nested tensors.
        ReturnedCacheError: if that is a KV cache.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    copies = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    own_args, own_kwargs = pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], spec)
    with untouched(model), nothing_registered(model):
        try:
            # transformers' exporters make caches known to pytree; they stay leaves here.
            outputs = pytree.tree_leaves(nn.Module.__call__(model, *own_args, **own_kwargs), is_leaf=is_kv_cache_object)
            outputs = _own(outputs)
        # The caller's model may raise anything.
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs, before it is captured: {describe_failure(error)}"
            ) from error
    odd = next(
        (leaf for leaf in outputs if not isinstance(leaf, (torch.Tensor, bool, int, float, str, tuple, type(None)))), None
    )
    if is_kv_cache_object(odd):
        raise ReturnedCacheError(f"{type(model).__name__} returns a {type(odd).__name__}, and a program keeps no KV cache")
    if odd is not None:
        raise CaptureError(
            f"{type(model).__name__} returns a {type(odd).__name__}, and PyTorch does not know what is in it; return a tensor, "
            f"a tuple or a mapping, or for a dataclass call torch.export.register_dataclass({type(odd).__name__}) first"
        )
    return outputs


def confirm(
    program: Program,
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    answer: Sequence[object] | None = None,
) -> Program:
    """Check the program against the model on the example, at size 1, and at other sizes; exclude size 1 if it fails.

    Args:
        answer: the model's outputs for the example, if known.

    Raises:
        CaptureError: if they disagree at a size the program accepts.
        RefusedSizesError: if the program refuses a size that should vary.
    """
    example = program.signature.flatten(args, kwargs)
    wanted = answer if answer is not None and not program.state else _answer(model, program, example)
    _require_equal(program, model, example, wanted)
    if program.signature.dimensions:
        compare_alike(model, program, lambda: _confirm_sizes(program, model, example))
    return program


def _confirm_sizes(program: Program, model: nn.Module, example: Sample) -> None:
    """Check the program at other sizes than the example's; exclude size 1 if it fails there. Raises what `confirm` raises."""
    dimensions = program.signature.dimensions
    sizes = program.signature.sizes_of(example)
    minimums, answers = {}, list[bool | None]()
    for symbol, dimension in dimensions.items():
        if dimension.minimum == 1 and sizes[symbol] > 1:
            agreed = _agrees(program, model, example, {symbol: 1})
            if agreed is not True:
                minimums[symbol] = replace(dimension, minimum=2)
            elif len(dimensions) == 1:
                answers.append(agreed)
    program.signature = replace(program.signature, dimensions={**dimensions, **minimums})
    larger = [{symbol: size + 1 + index for index, (symbol, size) in enumerate(sizes.items())}]
    larger += [{symbol: size * 2 for symbol, size in sizes.items()}]
    larger += [{symbol: max(size // 2, 2) for symbol, size in sizes.items()}]
    for other in larger:
        if other != sizes and answers.count(True) < 2:
            answers.append(_agrees(program, model, example, other))
    _refuse_difference(answers)
    if True not in answers:
        raise RefusedSizesError("the model refuses every size tried except the example's")


def confirm_calls(program: Program, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Compare program and model in calls in turn: on the example, on other values with every form of padding, and again.

    Both keep their state from call to call; it is restored afterwards. Calls that the model refuses, or answers with NaN, are
    left out. While a large model is compiled from the disk, a row of padding stands for all forms.

    Raises:
        CaptureError: saying whether values, masks, or the calls before made the difference.
    """
    signature = program.signature
    example = few_rows(signature, signature.flatten(args, kwargs), flops(program))
    varied = varied_samples(example)[-1:] if is_paged() else varied_samples(example)
    calls: list[tuple[Sample, list[object]]] = []
    with untouched(model):
        for sample in (example, *varied, example):
            with suppress(*REFUSALS):
                outputs = _call(model, program, sample)
                if not _has_nan(outputs):
                    calls.append((sample, outputs))
    with torch.no_grad(), kept_state(program):
        for sample, wanted in calls:
            try:
                outputs = _own(program.run(sample))
            except REFUSALS as error:
                raise CaptureError(
                    f"the captured program fails on inputs that {type(model).__name__} takes, with other values or masks than "
                    f"those of the example: {describe_failure(error)}"
                ) from error
            excess = _excess(program, wanted, outputs)
            if excess is not None:
                # Does the model itself answer otherwise after other calls than alone?
                in_turn = sample is example or (
                    _excess(program, wanted, _answer(model, program, sample)[: len(wanted)]) is not None
                )
                raise CaptureError(
                    f"the captured program differs from {type(model).__name__} by {excess[0]:.2g} relative, allowed "
                    f"{excess[1]:.2g}, {_IN_TURN if in_turn else _BY_VALUES}"
                )


_IN_TURN = (
    "when both are called several times: the model keeps state that is not a buffer, or is random; register what it keeps as a "
    "buffer"
)
_BY_VALUES = (
    "on inputs with other values or masks than those of the example: its code decides on values, or reads what an earlier call "
    "left"
)


def _excess(program: Program, wanted: Sequence[object], outputs: Sequence[object]) -> tuple[float, float] | None:
    """The error of the first output above its tolerance, and the tolerance; None if all are within."""
    pairs = zip(output_errors([wanted], [outputs]), tolerances(program), strict=False)  # no state among the outputs
    return next(((error, allowed) for error, allowed in pairs if error > allowed), None)


def refused_dimensions(program: Program, model: nn.Module, args: Sequence[object]) -> set[tuple[int, int]]:
    """The dimensions, with their inputs' `id`, that refuse every other size when varied alone.

    Raises:
        CaptureError: if the program and the model disagree at one.
    """
    example = program.signature.flatten(args, {})
    sizes = program.signature.sizes_of(example)
    refused: set[sympy.Symbol] = set()
    for symbol, size in sizes.items():
        others = {size + 1, size * 2, max(size // 2, 2)} - {size}
        answers = [_agrees(program, model, example, {symbol: other}) for other in others]
        _refuse_difference(answers)
        if True not in answers:
            refused.add(symbol)
    return {
        (id(tensor), dim)
        for tensor, leaf in zip(example, program.signature.tensors, strict=True)
        for dim, size in enumerate(leaf.type.shape)
        if isinstance(size, sympy.Basic) and size.free_symbols & refused
    }


def _refuse_difference(answers: Sequence[bool | None]) -> None:
    if False in answers:
        raise CaptureError("the program and the model disagree at sizes other than the example's")


def _agrees(program: Program, model: nn.Module, example: Sample, sizes: Mapping[sympy.Symbol, int]) -> bool | None:
    """True if the outputs of program and model agree at these sizes; None if one refuses them, or the model returns NaN."""
    sample = program.signature.sample_at(example, sizes)
    if sample is None:
        return None
    try:
        wanted = _answer(model, program, sample)
    except REFUSALS:
        return None
    if _has_nan(wanted):
        return None
    try:
        _require_equal(program, model, sample, wanted)
    except (CaptureError, *REFUSALS):
        return False
    return True


def _answer(model: nn.Module, program: Program, sample: Sample) -> list[object]:
    """The model's flat outputs for a sample, followed by its new state; the model's state is restored."""
    with untouched(model):
        outputs = _call(model, program, sample)
        return [*outputs, *_own([model.get_buffer(name) for name in program.state])]


def _call(model: nn.Module, program: Program, sample: Sample) -> list[object]:
    """The model's flat outputs for a sample."""
    args, kwargs = program.signature.arguments(sample)
    # GraphModule.__call__ prints the errors it raises, and the model may refuse the sizes tried here.
    return _own(pytree.tree_leaves(nn.Module.__call__(model, *args, **kwargs)))


def _has_nan(leaves: Sequence[object]) -> bool:
    return any(isinstance(leaf, torch.Tensor) and bool(leaf.isnan().any()) for leaf in leaves)


def _own(leaves: Sequence[object]) -> list[object]:
    """The outputs in memory of their own: an output may be a buffer, which is restored after the call."""
    return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _require_equal(program: Program, model: nn.Module, sample: Sample, wanted: Sequence[object]) -> None:
    """Raise CaptureError if the program's outputs differ from `wanted`."""
    outputs = run_samples(program, [sample])[0]
    for error, allowed in zip(output_errors([wanted], [outputs]), tolerances(program), strict=True):
        if error > allowed:
            raise CaptureError(
                f"the captured program differs from {type(model).__name__} by {error:.2g} relative, allowed "
                f"{allowed:.2g}; {_cause(model, program, sample)}"
            )


def _cause(model: nn.Module, program: Program, sample: Sample) -> str:
    """The reason a program and its model may differ on the same inputs, found by more calls of the model."""
    first, other, again = (_seeded(model, program, sample, seed) for seed in (0, 1, 0))
    allowed = max(tolerances(program), default=0.0)
    if any(error > allowed for error in output_errors([first], [again])):
        return "the model gives other outputs for the same inputs each time: it keeps state outside its buffers"
    if any(error > allowed for error in output_errors([first], [other])):
        return "the model is random in evaluation mode"
    return "its code takes another path while torch.export traces it"


def _seeded(model: nn.Module, program: Program, sample: Sample, seed: int) -> list[object]:
    """The model's outputs with all generators of random numbers seeded; `isolated` restores these after the capture."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return _answer(model, program, sample)
