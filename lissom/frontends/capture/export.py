"""Capture through non-strict `torch.export`: a module and example inputs in, a program out.

Batch and sequence are dynamic by default, if the model allows it: the model is exported with dynamic sizes, and the outputs
of the program are compared with the model's at other sizes.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx, nn
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lissom.compiler.ir.fake import recurrent_layers_whole
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.paging import is_paged
from lissom.errors import CaptureError
from lissom.frontends.capture.cache_lengths import CacheLengths, Place, cache_lengths
from lissom.frontends.capture.causal_masks import masks_as_given
from lissom.frontends.capture.confirm import RefusedSizesError, answer_to, confirm, confirm_calls, refused_dimensions
from lissom.frontends.capture.device import device_of, move
from lissom.frontends.capture.dynamic import (
    Dynamic,
    check_dynamic,
    declared_but_fixed,
    describe_dimensions,
    fixed_sizes,
    lines_that_fix,
    mask_dimensions,
    renamed,
    traced_inputs,
    wanted_dimensions,
)
from lissom.frontends.capture.experts import experts_for_all_tokens
from lissom.frontends.capture.failures import describe_failure, first_line, model_line
from lissom.frontends.capture.flatten import flatten_exported, named_arguments
from lissom.frontends.capture.isolation import isolated, with_own_modules, without_export_messages
from lissom.frontends.capture.kv_cache import (
    GENERATION,
    ReturnedCacheError,
    check_switch,
    describe_dropped_cache,
    is_kv_cache_object,
    without_kv_cache,
)
from lissom.frontends.capture.layers_alike import compare_alike, layers_alike
from lissom.frontends.capture.nested_tensors import encoders_without_nesting
from lissom.frontends.capture.recurrences import recurrences_as_operators
from lissom.frontends.capture.untouched import assignments_as_writes, nothing_registered, untouched
from lissom.frontends.capture.writes import return_writes

FreeDimensions = Callable[[torch.Tensor], dict[int, object]]
_BATCH_AND_SEQUENCE, _BATCH, _SEQUENCE, _NOTHING = (0, 1), (0,), (1,), ()
_WITH_CACHE = ((0, 1, 2), (0, 2))
_WORDS = ("batch", "sequence", "cache")


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        example: the caller's inputs, flat.
        notes: which sizes may vary, and which attempts failed.
        samples: the verification inputs; if there are none, the example and a variant of it are used.
        timed: inputs for timing besides the example; if there are none, the example at larger sizes is used.
    """

    program: Program
    example: Sample
    notes: tuple[str, ...]
    seconds: float
    samples: tuple[Sample, ...] = ()
    timed: tuple[Sample, ...] = ()


def capture(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic: Dynamic | bool = True,
    device: torch.device | None = None,
) -> Capture:
    """The model as a program. The model is not modified, and the program shares its weights.

    Args:
        dynamic: True finds out whether batch (dimension 0) and sequence (dimension 1) may vary; False fixes every size; a
            mapping names dimensions by argument, `{"input_ids": {0: "batch", 1: Dim("sequence", max=512)}}`.
        device: where the program runs; the weights are copied if the model is on another device.

    Raises:
        CaptureError: naming the line of the model that cannot be captured.
    """
    started = time.perf_counter()
    kwargs = dict(kwargs or {})
    check_model(model)
    check_dynamic(dynamic)
    _check_leaves((args, kwargs))
    with isolated(device_of(model, (args, kwargs))), torch.no_grad():
        given, model = model, with_own_modules(model)
        if isinstance(model, fx.GraphModule):
            kwargs = _in_order(model, args, kwargs)
        with untouched(model), evaluating(model), recurrences_as_operators(model, device), ExitStack() as stack:
            stack.enter_context(experts_for_all_tokens(model))
            stack.enter_context(encoders_without_nesting(model))
            stack.enter_context(masks_as_given())
            _bound(model, args, kwargs)
            with layers_alike(model):
                answer, dropped = _answer(model, args, kwargs, stack)
            answer = None if is_paged() else answer
            if isinstance(dynamic, Mapping):
                program, notes = _capture_named(model, args, kwargs, dynamic, answer)
            else:
                program, notes = _capture_by_trying(model, args, kwargs, dynamic, answer)
            notes += dropped
            # The caller's own model, unless it would have to be changed first: what a copy does may depend on the original.
            as_captured = dropped or any(module.training for module in given.modules())
            own = model if as_captured else given
            compare_alike(model, program, lambda: confirm_calls(program, own, args, kwargs))
    example = program.signature.flatten(args, kwargs)
    if device is not None:
        program, example = move(program, device), [tensor.to(device) for tensor in example]
    return Capture(program, example, tuple(notes), time.perf_counter() - started)


def _answer(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], stack: ExitStack
) -> tuple[list[object] | None, list[str]]:
    """The model's flat outputs, and a note if it returned a KV cache; it returns none then, until the stack closes.

    None for a graph module, which has no code of its own: an export error names the failing node.
    """
    if isinstance(model, fx.GraphModule):
        return None, []
    try:
        return answer_to(model, args, kwargs), []
    except ReturnedCacheError:
        check_switch(model, kwargs)
        stack.enter_context(without_kv_cache(model))
        return answer_to(model, args, kwargs), [describe_dropped_cache(model)]


def _capture_by_trying(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], dynamic: bool, answer: Sequence[object] | None
) -> tuple[Program, list[str]]:
    """Export with dynamic batch and sequence, else batch, else sequence, else neither; the first that agrees with the model."""
    tried: list[str] = []
    first: Exception | None = None
    plans = (_BATCH_AND_SEQUENCE, _BATCH, _SEQUENCE, _NOTHING) if dynamic else (_NOTHING,)
    leaves = pytree.tree_leaves((args, kwargs))
    masks = mask_dimensions([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
    lengths = cache_lengths(args, kwargs)
    if dynamic and lengths is not None:
        plans = (*_WITH_CACHE, *plans)
    for dims in plans:
        if isinstance(first, GuardOnDataDependentSymNode) and dims != _NOTHING:
            continue  # only with all sizes fixed may a value that depends on a size become a constant
        try:
            more = _cache_dimensions(lengths, dims, leaves)
            program, lines = _export(model, args, kwargs, partial(_free, dims, masks, more))
            program = confirm(program, model, args, kwargs, answer)
        # The model's code and torch.export may raise anything; the next plan fixes more sizes, and the last one reports it.
        except Exception as error:
            first = first or error
            if dims == _NOTHING:
                raise _explain(model, first) from first
            words = " and ".join(_WORDS[dim] for dim in dims)
            tried.append(f"tried {words} dynamic: {first_line(error)}")
            continue
        fixed = declared_but_fixed(model, program.signature) or fixed_sizes(program.signature, lines) if dynamic else []
        return program, [describe_dimensions(program.signature), *tried, *fixed]
    raise AssertionError("the last plan returns or raises")


def capture_sizes(
    model: nn.Module, args: Sequence[object], dims_of: FreeDimensions, refuse: Callable[[Program], None]
) -> Program:
    """The model as a program with the dynamic dimensions of `dims_of`, as far as the model allows them.

    Args:
        refuse: raises CaptureError for a program that is not wanted, before it is compared with the model.

    Raises:
        CaptureError: if the model cannot be captured, or `refuse` raises it.
    """
    with isolated(device_of(model, args)), evaluating(model), recurrences_as_operators(model), _explained(model):
        program, _ = _export(model, args, {}, dims_of)
        refuse(program)
        try:
            return confirm(program, model, args, {})
        except RefusedSizesError:
            fixed = refused_dimensions(program, model, args)
        if not fixed:
            return program  # each dimension varies alone

        def others(tensor: torch.Tensor) -> dict[int, object]:
            return {dim: dimension for dim, dimension in dims_of(tensor).items() if (id(tensor), dim) not in fixed}

        return confirm(_export(model, args, {}, others)[0], model, args, {})


def _capture_named(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object], dynamic: Dynamic, answer: Sequence[object] | None
) -> tuple[Program, list[str]]:
    """Export with exactly the dynamic dimensions the caller names."""
    named = wanted_dimensions(dynamic, named_arguments(args, kwargs, _parameters(model)), _bound(model, args, kwargs))
    wanted: dict[int, dict[int, object]] = {}
    for position, leaf in enumerate(pytree.tree_leaves((tuple(args), dict(kwargs)))):
        wanted.setdefault(id(leaf), {}).update(dict.fromkeys(named.given.get(position, {}), Dim.AUTO))
    with _explained(model):
        program, lines = _export(model, args, kwargs, lambda tensor: wanted.get(id(tensor), {}), named.names)
        program = renamed(program, named, lines)
        program = confirm(program, model, args, kwargs, answer)
    return program, [describe_dimensions(program.signature)]


@contextmanager
def _explained(model: nn.Module) -> Generator[None]:
    """Raise CaptureError for any error of the block: the caller's code is traced, and may raise anything."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        raise _explain(model, error) from error


def _cache_dimensions(lengths: CacheLengths | None, dims: Sequence[int], leaves: Sequence[object]) -> dict[int, set[int]]:
    """The dimensions that vary with the cached tokens in a plan with `cache`, by input `id`."""
    varying: dict[int, set[int]] = {}
    if lengths is None or 2 not in dims:
        return varying
    for place, dim in lengths.of_cache | lengths.of_both | (lengths.of_tokens if 1 in dims else frozenset()):
        varying.setdefault(id(leaves[place]), set()).add(dim)
    return varying


def _free(
    dims: Sequence[int], masks: Mapping[int, Sequence[int]], more: Mapping[int, set[int]], tensor: torch.Tensor
) -> dict[int, object]:
    """The dynamic dimensions of one input: batch; sequence for inputs of rank 2 or 3, and for masks over pairs of tokens.

    Args:
        more: dimensions of caches and of what grows with them.
    """
    last = 1 if tensor.dim() in (2, 3) else 0
    pairs = (*(masks.get(id(tensor), ()) if 1 in dims else ()), *more.get(id(tensor), ()))
    return {dim: Dim.AUTO for dim in (*dims, *pairs) if dim in pairs or (dim < tensor.dim() and dim <= last)}


def _export(
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    dims_of: FreeDimensions,
    names: Mapping[Place, str] | None = None,
) -> tuple[Program, dict[tuple[str, int], str]]:
    """Export with the dynamic dimensions of `dims_of`, and flatten the result; with the lines that fix one of them.

    Args:
        names: the caller's names of dimensions.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    dims = {id(leaf): dims_of(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)}
    free = {dim for tensor_dims in dims.values() for dim in tensor_dims}
    lengths = cache_lengths(args, kwargs, names or {})
    traced = traced_inputs(leaves, dims, lengths)
    hints = [dims.get(id(leaf)) for leaf in leaves]
    traced_args, traced_kwargs = pytree.tree_unflatten(traced, spec)
    hint_args, hint_kwargs = pytree.tree_unflatten(hints, spec)
    bound = _bound(model, hint_args, hint_kwargs)
    # The model runs again afterwards for comparison, and must not hold fake tensors of the export then.
    with untouched(model), without_export_messages(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export", UserWarning)
        with nothing_registered(model), assignments_as_writes(model), recurrent_layers_whole():
            dynamic = bound if free else None
            exported = torch.export.export(model, traced_args, traced_kwargs, dynamic_shapes=dynamic, strict=False)
    if not return_writes(exported):
        with warnings.catch_warnings(), recurrent_layers_whole():
            # PyTorch itself copies module metadata that has a deprecated class.
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            exported = exported.run_decompositions({})
    parameters = tuple(_parameters(model))
    lines = lines_that_fix(exported)
    name = type(model).__name__
    return flatten_exported(exported, name, args, kwargs, parameters, lengths=lengths, names=names or {}), lines


def _parameters(model: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(model.forward).parameters.items() if parameter.kind in kinds]


def _bound(model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward{inspect.signature(model.forward)}: {error}; "
            f"a tuple is positional, a mapping is keywords"
        ) from error


def _in_order(model: fx.GraphModule, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """The keyword arguments in the order of the graph's inputs, without gaps: `torch.export` passes them by position."""
    given = _bound(model, args, kwargs)
    parameters = list(inspect.signature(model.forward).parameters.values())
    last = max((index for index, parameter in enumerate(parameters) if parameter.name in given), default=-1)
    return {parameter.name: given.get(parameter.name, parameter.default) for parameter in parameters[len(args) : last + 1]}


def check_model(model: object) -> None:
    """Refuse anything but a module with initialized weights. Raises CaptureError."""
    if inspect.isclass(model):
        raise CaptureError(f"the model is the class {model.__name__}; pass an object of it, {model.__name__}(...)")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        made = "TorchScript" if isinstance(model, torch.jit.ScriptModule) else "torch.compile"
        raise CaptureError(f"the model was made by {made}; pass the torch.nn.Module it was made from")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}; pass a torch.nn.Module")
    scripted = next((path for path, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise CaptureError(
            f"submodule '{scripted}' was made by TorchScript; replace it by the torch.nn.Module it was made from"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(f"weight '{name}' has no size before the model's first call; call the model once")
        if tensor.is_meta:
            raise CaptureError(f"weight '{name}' is on the meta device and has no values; load the model's weights first")


def _check_leaves(inputs: object) -> None:
    for path, leaf in pytree.tree_flatten_with_path(inputs, is_leaf=is_kv_cache_object)[0]:
        if leaf is not None and not isinstance(leaf, (torch.Tensor, bool, int, float, str)):
            where = pytree.keystr(path[1:])
            if is_kv_cache_object(leaf):
                raise CaptureError(f"example input {where} is a KV cache, and a program keeps none; leave it out; {GENERATION}")
            raise CaptureError(
                f"example input {where} is a {type(leaf).__name__}; inputs are tensors, numbers, flags, text, None, "
                f"or nests of these: convert it first"
            )
        if isinstance(leaf, torch.Tensor):
            kind = _odd_kind(leaf)
            if kind is not None:
                raise CaptureError(
                    f"example input {pytree.keystr(path[1:])} is a {kind} tensor; "
                    f"a program takes plain, dense tensors with values"
                )


def _odd_kind(tensor: torch.Tensor) -> str | None:
    """The kind of a tensor that programs do not take, such as sparse; None for a plain tensor."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_quantized:
        return "quantized"
    return "meta" if tensor.is_meta else None


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Set every submodule to evaluation mode, and restore each one's mode when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _explain(model: nn.Module, error: Exception) -> CaptureError:
    """The error of a failed capture: the model, its line, what happened, what to do."""
    name = type(model).__name__
    if isinstance(error, CaptureError):
        return error
    if isinstance(error, GuardOnDataDependentSymNode):
        return CaptureError(
            f"{name} cannot be captured: {model_line(error)} decides on the values of a tensor, and a graph has one path for "
            f"all values; use torch.where or torch.cond there, or compile the part without it"
        )
    return CaptureError(f"{name} cannot be captured: {describe_failure(error)}")
