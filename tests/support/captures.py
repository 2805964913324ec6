"""Captures that tests share: a test of a pass spends most of its time in `torch.export` of a model that others capture too.

So are the canonical passes that each compile starts with, and their checks.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils import _pytree as pytree

import lissom
from lissom.api import Optimized
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.frontends.capture.export import Capture, capture
from lissom.frontends.capture.untouched import alias
from lissom.runtime.compiled_model import CompiledModel
from tests.support import canonical_steps

Key = tuple[object, ...]

_CAPTURES: dict[Key, tuple[nn.Module, Capture]] = {}
_KEPT = 200
"""How many captures are kept, those last used; tests that share some are near each other."""
_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


_CAPTURING = ("lissom.driver.compile", "lissom.frontends.generation.decoder", "lissom.frontends.generation.encoder_decoder")


@contextmanager
def shared() -> Generator[None]:
    """Within it all compiles share captures and canonical passes, those of decoders and of commands too."""
    with ExitStack() as stack:
        for module in _CAPTURING:
            stack.enter_context(mock.patch(f"{module}.capture", capture_once))
        stack.enter_context(mock.patch.object(Pipeline, "_steps", canonical_steps.steps))
        yield


def optimize(model: nn.Module, inputs: Any, **options: Any) -> Optimized:
    """`lissom.optimize`, with the capture of `capture_once`."""
    with shared():
        return lissom.optimize(model, inputs, **options)


def compile(model: nn.Module, inputs: Any, **options: Any) -> CompiledModel:
    """`lissom.compile`, with the capture of `capture_once`; lossy passes are kept untimed unless the options say otherwise."""
    options = {"goal": None} | options
    with shared():
        return lissom.compile(model, inputs, **options)


def capture_once(model: nn.Module, args: Any, kwargs: Any, **options: Any) -> Capture:
    """`capture`, made once in a session for all equal models; the program reads the weights of the model that is given.

    Models of transformers are equal by their configuration, others by their classes and the plain attributes of their modules;
    what holds anything else is captured anew. All have equal weights.
    """
    given = (args, kwargs, options)
    key = _key(model, given)
    if key is None:
        return capture(model, args, kwargs, **options)
    held = _CAPTURES.pop(key, None)
    if held is None or _key(held[0], given) != key:  # a test has changed the weights in place
        held = model, capture(model, args, kwargs, **options)
    _CAPTURES[key] = first, found = held
    if len(_CAPTURES) > _KEPT:
        del _CAPTURES[next(iter(_CAPTURES))]
    program = _with_weights_of(model, first, found.program)
    edits, state = program.edits, program.state_values()
    origin = canonical_steps.Origin(key, model, edits, state, lambda other: _key(other, given) == key, _with_weights_of)
    setattr(program, canonical_steps.ORIGINS, origin)
    return dataclasses.replace(found, program=program, example=list(found.example))


def _with_weights_of(model: nn.Module, first: nn.Module, program: Program) -> Program:
    """A copy of a program captured from `first` that reads the weights of `model`; its state is its own."""
    theirs, ours = (
        [*item.named_parameters(remove_duplicate=False), *item.named_buffers(remove_duplicate=False)] for item in (first, model)
    )
    own = {_place(old): new for (_, old), (_, new) in zip(theirs, ours, strict=True)}
    copied = program.copy()
    # Each is set, so that they stay in their order.
    for name, weight in [*copied.weights().items()]:
        if name in copied.state:
            copied.set_weight(name, weight.clone())
        else:
            copied.set_weight(name, alias(own[_place(weight)]) if _place(weight) in own else weight)
    return copied


def _place(tensor: torch.Tensor) -> Key:
    """Where a tensor lies in memory."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _key(model: nn.Module, given: object) -> Key | None:
    """The same for models that compute the same, called with the same; None where that is not known."""
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    if hasattr(model, "config"):
        made = repr((model.config, getattr(model.config, "_attn_implementation", "")))
        forward = _own_forward(model)
        return None if forward is None else (*modules, made, *forward, _fingerprint(model, given))
    attributes = [_attributes(module) for module in model.modules()]
    return None if None in attributes else (*modules, *attributes, _fingerprint(model, given))


def _own_forward(model: nn.Module) -> Key | None:
    """What tells a `forward` that was set on a module from others, as that of a decoder with its cache; None if not known."""
    forward = vars(model).get("forward")
    if forward is None:
        return ()
    if not isinstance(forward, FunctionType):
        return None
    held = [cell.cell_contents for cell in forward.__closure__ or ()]
    return forward.__code__, *(repr(item) for item in held if not isinstance(item, nn.Module))


def _attributes(module: nn.Module) -> Key | None:
    """What a module holds beside parameters, buffers and modules; None where its forward may depend on more than that."""
    hooked = any(vars(module)[name] for name in ("_forward_hooks", "_forward_pre_hooks"))
    found = [(name, _described(value)) for name, value in vars(module).items() if name not in _OF_EVERY_MODULE]
    return None if hooked or any(value is None for _, value in found) else tuple(found)


def _described(value: object) -> object | None:
    """The same for values that are equal and of one type; None where that is not known."""
    if isinstance(value, tuple):
        parts = tuple(map(_described, value))
        return None if None in parts else parts
    # A function computes the same if it reads nothing of what was around it when it was made.
    if isinstance(value, type) or (isinstance(value, FunctionType) and value.__closure__ is None):
        return value
    return repr(value) if isinstance(value, _PLAIN) else None


def _fingerprint(model: nn.Module, given: object) -> str:
    """Of all numbers, how they are tied and lie in memory, and of what the model is called with."""
    found = hashlib.sha256()
    tied = [list(dict(model.named_parameters(remove_duplicate=False))), list(dict(model.named_parameters()))]
    leaves, structure = pytree.tree_flatten(given)
    found.update(repr((tied, [name for name, _ in model.named_buffers()], structure)).encode())
    for item in (*model.parameters(), *model.buffers(), *leaves):
        if isinstance(item, torch.Tensor):
            found.update(repr((item.dtype, item.shape, item.stride(), item.device, item.requires_grad)).encode())
            found.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(item).encode())
    return found.hexdigest()
