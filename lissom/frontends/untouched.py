"""What keeps a caller's model as it was: capture puts back what a model's forward changed, and programs read its weights only.

`torch.export` runs a model's own Python with fake tensors. A forward that keeps what it computed, such as a table of
frequencies in an attribute, leaves a fake tensor in the model, and the model's next answers are wrong.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import cast

import torch
from torch import nn

from lissom.errors import CaptureError

_Container = dict[object, object] | list[object] | set[object]
_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """Put back every attribute, parameter, buffer, submodule and training mode of a model and of what is in it.

    Attributes are compared by identity; of lists, dictionaries and sets among them, what they hold is put back as well.

    Raises: CaptureError when a tensor that is no buffer was written in place, which cannot be put back.
    """
    kept = [_Kept.of(path, module) for path, module in model.named_modules()]
    buffers = [(buffer, _version(buffer), buffer.detach().clone()) for buffer in model.buffers()]
    versions = [(path, tensor, _version(tensor)) for item in kept for path, tensor in item.tensors()]
    try:
        yield
    finally:
        for item in kept:
            item.put_back()
        for buffer, version, values in buffers:
            if _version(buffer) != version:
                with torch.no_grad():
                    buffer.copy_(values)
    written = next((path for path, tensor, version in versions if _version(tensor) != version), None)
    if written is not None:
        raise CaptureError(
            f"{type(model).__name__} writes to '{written}' in place, and it holds other values now: load the model again, and "
            f"register what it keeps as a buffer"
        )


@contextmanager
def nothing_registered(model: nn.Module) -> Generator[None]:
    """Refuse a forward that registers buffers, parameters or submodules: export loses buffers, and new weights are random.

    Raises: CaptureError naming the first.
    """
    before = _registered(model)
    try:
        yield
    finally:
        made = next((item for item in _registered(model) if item not in before), None)
        if made is not None:
            kind, path, _ = made
            raise CaptureError(
                f"{type(model).__name__} registers the {kind} '{path}' while it runs; call the model once before, or register "
                f"it in __init__"
            )


def _registered(model: nn.Module) -> dict[tuple[str, str, bool], None]:
    """The buffers, parameters and submodules: what each is, its path, and whether it is saved."""
    found: dict[tuple[str, str, bool], None] = {}
    for path, module in model.named_modules():
        kinds = {"submodule": module._modules, "parameter": module._parameters, "buffer": module._buffers}
        for kind, held in kinds.items():
            for name in held:
                found[kind, f"{path}.{name}".removeprefix("."), name not in module._non_persistent_buffers_set] = None
    return found


@dataclass(frozen=True)
class _Kept:
    """What a module held. path: its own. attributes: its `__dict__`. held: what the containers among them held."""

    path: str
    module: nn.Module
    attributes: dict[str, object]
    held: dict[str, _Container]

    @classmethod
    def of(cls, path: str, module: nn.Module) -> _Kept:
        attributes = dict(module.__dict__)
        containers = {name: value for name, value in attributes.items() if type(value) in _CONTAINERS}
        held = {name: cast(_Container, value).copy() for name, value in containers.items()}
        return cls(path, module, attributes, held)

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors a forward has no business to write to, by path: parameters and plain attributes, not buffers."""
        parameters = {name: value for name, value in self.module._parameters.items() if value is not None}
        found = {**parameters, **{name: value for name, value in self.attributes.items() if isinstance(value, torch.Tensor)}}
        return [(f"{self.path}.{name}".removeprefix("."), tensor) for name, tensor in found.items()]

    def put_back(self) -> None:
        """Give the module what it held; what did not change is not written, as another thread may be running the model."""
        now = self.module.__dict__
        for name in now.keys() - self.attributes.keys():
            del now[name]
        for name, value in self.attributes.items():
            if now.get(name, now) is not value:
                now[name] = value
        for name, before in self.held.items():
            _refill(cast(_Container, self.attributes[name]), before)


def _refill(container: _Container, before: _Container) -> None:
    """Give a container what it held."""
    if len(container) == len(before) and all(map(is_, _objects(container), _objects(before))):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _objects(container: _Container) -> Iterator[object]:
    """What a container holds, in order; keys and values of a dictionary."""
    return chain(container, container.values()) if isinstance(container, dict) else iter(container)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place; tensors made under inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def alias(weight: torch.Tensor) -> torch.Tensor:
    """Another tensor in a weight's memory that requires no gradient, for a program to read.

    It is a parameter where the weight is one that can be trained: `Program.trainable` copies these, and makes them require
    gradients.
    """
    plain = ordinary(weight.detach())
    trained = isinstance(weight, nn.Parameter) and weight.requires_grad
    return nn.Parameter(plain, requires_grad=False) if trained else plain


def ordinary(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one in its memory that autograd may see too where it was made under inference mode."""
    if not tensor.is_inference():
        return tensor
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return ordinary(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
