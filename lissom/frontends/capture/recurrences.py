"""Recurrent layers as one operator: functions of models that unroll a recurrence over tokens are exchanged for a capture.

torch.export unrolls their loops into thousands of nodes, for one length only. The functions are known by name and parameters,
in transformers and in code made after it. Outside of the export every call is compared with the function's own result, at each
call and not at the model's outputs: in a deep model with a recurrence, differences of rounding grow from layer to layer. Where
the two differ by more than rounding, the function's result in float64 decides.
"""

# ruff: noqa: N803  The names of parameters are those of the functions that are exchanged.

from __future__ import annotations

import inspect
import math
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lissom.compiler.verify.divergence import TOLERANCE, relative_error
from lissom.errors import CaptureError
from lissom.frontends.capture.isolation import exchanged
from lissom.ops import gated_delta_rule, selective_scan

Function = Callable[..., Any]
_MARK = "of_lissom"
"""Marks functions that were exchanged already."""


@contextmanager
def recurrences_as_operators(model: nn.Module, device: torch.device | None = None) -> Generator[None]:
    """Exchange the functions in the Python modules that define the model's layers, in this thread, until the block ends.

    Args:
        device: where the program will run, if not where the model is. The operators have kernels on the CPU alone, so on other
            devices the model's own functions stay.

    Raises:
        CaptureError: in a call of a function, if it and its operator differ.
    """
    devices = {device or tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with ExitStack() as stack:
        for name, (replaced, parameters) in _FUNCTIONS.items() if all(used.type == "cpu" for used in devices) else ():
            for module in modules_with(model, name):
                own = vars(module)[name]
                if set(parameters) <= set(_signature(own).parameters) and not hasattr(own, _MARK):
                    stack.enter_context(exchanged(module, name, _checked(name, own, partial(replaced, own))))
        yield


def modules_with(model: nn.Module, name: str) -> list[ModuleType]:
    """The Python modules that define the model's layers and have a function of that name."""
    python_modules = (sys.modules.get(owner) for owner in sorted({type(layer).__module__ for layer in model.modules()}))
    return [module for module in python_modules if module is not None and callable(vars(module).get(name))]


def _signature(own: Function) -> inspect.Signature:
    """The parameters of a function, also of one that transformers keeps in a module, to exchange it for a kernel."""
    function = inspect.unwrap(own)
    return inspect.signature(function.forward if isinstance(function, nn.Module) else function)


def _checked(name: str, own: Function, replacement: Function) -> Function:
    """The replacement, compared with the function itself where it computes numbers; in other threads the function itself."""
    thread = threading.get_ident()

    def call(*args: object, **kwargs: object) -> object:
        packed = any(kwargs.get(given) is not None for given in _PACKED)
        if threading.get_ident() != thread or packed or not args:
            return own(*args, **kwargs)
        if torch.compiler.is_exporting():
            return replacement(*args, **kwargs)
        # The first argument of a decode step is the state, which it overwrites.
        assert isinstance(args[0], torch.Tensor)
        before, state = args[0].clone(), args[0].clone()
        wanted = own(state, *args[1:], **kwargs)
        output = replacement(*args, **kwargs)
        results = (output, args[0])
        error, allowed = _error((wanted, state), results), _allowed(args, kwargs)
        if error > allowed and _error(_exact(own, before, *args[1:], **kwargs), tree_map(_double, results)) > allowed:
            raise CaptureError(
                f"{name} and the operator for it differ by {error:.2g} relative, allowed {allowed:.2g}; the model's code "
                f"may be changed, or its numbers may overflow"
            )
        return output

    setattr(call, _MARK, True)
    return call


def _error(wanted: object, actual: object) -> float:
    """The largest relative error between the tensors of two trees; infinite if they are not alike."""
    one, two = tree_leaves(wanted), tree_leaves(actual)
    return max(map(relative_error, one, two)) if len(one) == len(two) else math.inf


def _exact(own: Function, *args: object, **kwargs: object) -> tuple[object, object]:
    """The result of a function for operands in float64, and its first argument after the call.

    Some functions take differences of sums over all tokens, which cancel: in float32 they are wrong by the size of the sum.
    """
    given, options = tree_map(_double, (args, kwargs))
    with _InFloat64():
        return own(*given, **options), given[0]


def _double(value: object) -> object:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class _InFloat64(TorchFunctionMode):
    """Computes in float64 where float32 is asked for."""

    def __torch_function__(
        self, func: Function, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        args, options = tree_map(self._wide, (args, kwargs or {}))
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **options)

    @staticmethod
    def _wide(value: object) -> object:
        return torch.float64 if value is torch.float32 else value


def _allowed(args: Sequence[object], kwargs: Mapping[str, object]) -> float:
    """The tolerance of the lowest precision among the operands, in which the functions compute some of their products."""
    operands = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    return max(
        (TOLERANCE.get(operand.dtype, 0.0) for operand in operands if operand.dtype != torch.float64),
        default=TOLERANCE[torch.float32],
    )


def _delta_rule(own: Function, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule, by chunks or by tokens, with a decay per head or per feature."""
    bound = _signature(own).bind(*args, **options)
    bound.apply_defaults()
    arguments = bound.arguments
    query, key, value, decay, beta, state, wants_state, normalizes = (arguments[name] for name in _RULE)
    y, last = gated_delta_rule(query, key, value, decay, beta, state, scale=key.shape[-1] ** -0.5, normalizes=normalizes)
    return y.to(query.dtype), last.float() if wants_state else None


def _chunk_scan(
    _own: Function,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_others: object,
) -> object:
    """The selective scan of Mamba-2. Like the function itself, it returns float32 and does nothing with a gate z."""
    step = torch.clamp(_step(dt, dt_bias, dt_softplus), min=dt_limit[0], max=dt_limit[1])
    x, step, a, b, c = (operand.float() for operand in (hidden_states, step, A, B, C))
    y, last = selective_scan(x, step, a, b, c, D, initial_states)
    y = y if D is None else y.to(torch.promote_types(y.dtype, D.dtype))
    return (y, last) if return_final_states else y


@contextmanager
def scans_continued(model: nn.Module, cache: Any) -> Generator[None]:
    """Let the layers of Mamba-1 start from the state in a cache of transformers, in this thread, until the block ends.

    transformers' function for several tokens takes no state: its layers start anew at each call of more than one.
    """
    with ExitStack() as stack:
        for module in modules_with(model, _FORGETS):
            for layer in model.modules():
                if type(layer).__module__ == module.__name__ and not _SCANS.isdisjoint(_names(type(layer))):
                    stack.enter_context(exchanged(layer, "forward", partial(_continued, layer, module, cache)))
        yield


def _names(layer: type[nn.Module]) -> tuple[str, ...]:
    """The names that a layer's forward reads."""
    return inspect.unwrap(layer.forward).__code__.co_names


def _continued(layer: Any, module: ModuleType, cache: Any, /, *args: object, **kwargs: object) -> object:
    """The layer's forward, with scans that start from its state; of several, one for each head of it."""
    state = cache.get_recurrent_state(layer.layer_idx)
    states = iter((state,) if state.dim() == 3 else state.unbind(1))
    own, thread = vars(module)[_FORGETS], threading.get_ident()

    def scan(*given: Any, **options: Any) -> object:
        if threading.get_ident() != thread:
            return own(*given, **options)
        return _token_scan(own, *given, **options, state=next(states))

    with exchanged(module, _FORGETS, scan):
        return type(layer).forward(layer, *args, **kwargs)


def _token_scan(
    _own: Function,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    state: torch.Tensor | None = None,
    **_others: object,
) -> object:
    """The selective scan of Mamba-1, which has one channel a head, and tokens in the last dimension."""
    step = _step(dt, None if delta_bias is None else delta_bias[..., None], delta_softplus)
    x = hidden_states if D is None else hidden_states.to(torch.promote_types(hidden_states.dtype, D.dtype))
    b, c = (operand.transpose(1, 2).unsqueeze(2) for operand in (B, C))
    y, last = selective_scan(
        x.transpose(1, 2).unsqueeze(-1), step.transpose(1, 2), A, b, c, D, None if state is None else state.unsqueeze(2)
    )
    y = y.squeeze(-1).transpose(1, 2)
    if z is not None:
        y = y * functional.silu(z)
    return (y, last.squeeze(2)) if return_last_state else y


def _state_update(
    own: Function,
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **others: object,
) -> torch.Tensor:
    """A decode step of Mamba-2, which gives its rates per channel and state, and overwrites the state."""
    if A.dim() != 3 or A.stride()[1:] != (0, 0) or B.dim() != 3:
        return own(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **others)
    step = _step(dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus)
    x, step, b, c = (operand.float().unsqueeze(1) for operand in (hidden_states, step, B, C))
    y, last = selective_scan(x, step, A[:, 0, 0].float(), b, c, None if D is None else D[:, 0], state)
    state.copy_(last)
    y = y.squeeze(1)
    return (y if z is None else y * functional.silu(z)).to(hidden_states.dtype)


def _step(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    step = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(step) if softplus else step


_RULE = ("query", "key", "value", "g", "beta", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel")
_PACKED = ("cu_seqlens", "seq_idx")
"""The parameters with which several texts share a row; the operators have none of them."""
_SCAN = ("hidden_states", "dt", "A", "B", "C")
_FORGETS = "mamba_selective_scan"
"""The function of transformers that computes the recurrence of Mamba-1, always from zeros."""
_SCANS = {_FORGETS, "mamba_scan_forward"}
"""The functions by which a layer calls it: itself, or one of transformers 5.25 and later that also reads the cache."""
_FUNCTIONS: Mapping[str, tuple[Function, tuple[str, ...]]] = {
    "torch_chunk_gated_delta_rule": (_delta_rule, _RULE),
    "torch_recurrent_gated_delta_rule": (_delta_rule, _RULE),
    "chunk_kimi_delta_attention": (_delta_rule, _RULE),
    "recurrent_kimi_delta_attention": (_delta_rule, _RULE),
    "mamba2_chunk_scan": (_chunk_scan, (*_SCAN, "chunk_size")),
    "mamba2_selective_state_update": (_state_update, ("state", *_SCAN)),
    _FORGETS: (_token_scan, (*_SCAN, "D", "z", "delta_bias")),
}
"""The functions by name: the replacement, which is given the function itself first, and the parameters it must have."""
