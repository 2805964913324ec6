"""Checks of a captured program against its model, on the example inputs and at other sizes."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lissom.compiler.ir.interpreter import REFUSALS
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, resize
from lissom.compiler.verify.divergence import output_errors, run_samples, tolerances
from lissom.errors import CaptureError, InputError
from lissom.frontends.failures import describe_failure
from lissom.frontends.kv_cache import ReturnedCacheError, is_kv_cache_object


class RefusedSizesError(CaptureError):
    """The model, or the bounds found during capture, refuse every size tried other than the example's."""


def answer_to(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> list[object]:
    """The model's flat outputs for copies of the example inputs. Its buffers are restored.

    Raises: CaptureError if the model itself fails, with its error, or returns anything but nested tensors; ReturnedCacheError
        if that is a KV cache.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    copies = {id(leaf): leaf.clone() for leaf in leaves if isinstance(leaf, torch.Tensor)}
    own_args, own_kwargs = pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], spec)
    with _restored_buffers(model, [name for name, _ in model.named_buffers()]):
        try:
            # transformers' exporters make caches known to pytree; they stay leaves here.
            found = pytree.tree_leaves(nn.Module.__call__(model, *own_args, **own_kwargs), is_leaf=is_kv_cache_object)
        # The caller's model may raise anything.
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} itself fails on the example inputs, before it is captured: {describe_failure(error)}"
            ) from error
    odd = next((leaf for leaf in found if not isinstance(leaf, (torch.Tensor, bool, int, float, str, tuple, type(None)))), None)
    if is_kv_cache_object(odd):
        raise ReturnedCacheError(f"{type(model).__name__} returns a {type(odd).__name__}, and a program keeps no KV cache")
    if odd is not None:
        raise CaptureError(
            f"{type(model).__name__} returns a {type(odd).__name__}, and PyTorch does not know what is in it; return a tensor, "
            f"a tuple or a mapping, or for a dataclass call torch.export.register_dataclass({type(odd).__name__}) first"
        )
    return found


def confirm(
    program: Program,
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    answer: Sequence[object] | None = None,
) -> Program:
    """Check the program against the model on the example, at size 1, and at other sizes; exclude size 1 if it fails.

    answer: the model's outputs for the example, if known.

    Raises: CaptureError if they disagree at a size the program accepts. RefusedSizesError.
    """
    dimensions = program.signature.dimensions
    example = program.signature.flatten(args, kwargs)
    wanted = answer if answer is not None and not program.state else _answer(model, program, example)
    _require_equal(program, model, example, wanted)
    if not dimensions:
        return program
    sizes = program.signature.sizes_of(example)
    minimums = {}
    for symbol, dimension in dimensions.items():
        if dimension.minimum == 1 and _agrees(program, model, example, {**sizes, symbol: 1}) is not True:
            minimums[symbol] = replace(dimension, minimum=2)
    program.signature = replace(program.signature, dimensions={**dimensions, **minimums})
    larger = [{symbol: size + 1 + index for index, (symbol, size) in enumerate(sizes.items())}]
    larger += [{symbol: size * 2 for symbol, size in sizes.items()}]
    larger += [{symbol: max(size // 2, 2) for symbol, size in sizes.items()}]
    answers: list[bool | None] = []
    for other in larger:
        if other != sizes and answers.count(True) < 2:
            answers.append(_agrees(program, model, example, other))
    _refuse_difference(answers)
    if True not in answers:
        raise RefusedSizesError("the model refuses every size tried except the example's")
    return program


def refused_dimensions(program: Program, model: nn.Module, args: Sequence[object]) -> set[tuple[int, int]]:
    """The dimensions, with their inputs' `id`, that refuse every other size when varied alone.

    Raises: CaptureError if the program and the model disagree at one.
    """
    example = program.signature.flatten(args, {})
    sizes = program.signature.sizes_of(example)
    refused: set[sympy.Symbol] = set()
    for symbol, size in sizes.items():
        others = {size + 1, size * 2, max(size // 2, 2)} - {size}
        answers = [_agrees(program, model, example, {**sizes, symbol: other}) for other in others]
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
    """Whether the outputs of program and model agree at these sizes; None if one of them refuses the sizes."""
    sample = resize(program.signature, example, sizes)
    try:
        program.signature.check_sizes(sample)
        wanted = _answer(model, program, sample)
    except (InputError, *REFUSALS):
        return None
    try:
        _require_equal(program, model, sample, wanted)
    except (CaptureError, *REFUSALS):
        return False
    return True


def _answer(model: nn.Module, program: Program, sample: Sample) -> list[object]:
    """The model's flat outputs for a sample, followed by its new state; the model's state is restored."""
    args, kwargs = program.signature.arguments(sample)
    with _restored_buffers(model, program.state):
        # GraphModule.__call__ prints the errors it raises, and the model may refuse the sizes tried here.
        wanted = pytree.tree_leaves(nn.Module.__call__(model, *args, **kwargs))
        return [*wanted, *(model.get_buffer(name).clone() for name in program.state)]


def _require_equal(program: Program, model: nn.Module, sample: Sample, wanted: Sequence[object]) -> None:
    """Raise CaptureError if the program's outputs differ from `wanted`."""
    found = run_samples(program, [sample])[0]
    for error, allowed in zip(output_errors([wanted], [found]), tolerances(program), strict=True):
        if error > allowed:
            raise CaptureError(
                f"the captured program differs from {type(model).__name__} by {error:.2g} relative, allowed "
                f"{allowed:.2g}; the model may be random, or keep state outside its buffers"
            )


@contextmanager
def _restored_buffers(model: nn.Module, names: Sequence[str]) -> Generator[None]:
    """Restore the buffers that a call of the model writes."""
    buffers = {name: model.get_buffer(name) for name in names}
    # A buffer made under inference mode cannot be written outside of it.
    buffers = {name: tensor for name, tensor in buffers.items() if not tensor.is_inference()}
    saved = {name: (tensor.clone(), tensor._version) for name, tensor in buffers.items()}
    try:
        yield
    finally:
        for name, (before, version) in saved.items():
            if buffers[name]._version != version:
                buffers[name].copy_(before)
