"""Tensors that say they are on `cuda:0`, hold their values on the CPU, and refuse what a GPU would refuse.

An operator on them runs on the CPU, after these checks:

- All tensors are on the device. As in PyTorch, a CPU scalar may be an argument, and copies may cross.
- An operator that is not PyTorch's own has a kernel for CUDA, or is written in terms of others; a kernel for the CPU is none.
- The constraints of kernels that only a GPU has: sizes of `_int_mm`, int4 and 2:4 products.
- While a CUDA graph records, the host reads no value, and nothing is copied between the host and the device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tools.pretend_cuda.kernels import OWN, REFERENCES, require_kernel
from tools.pretend_cuda.recording import recording, waiting_is_refused

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
CROSSING = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Storage, aten._copy_from.default}
"""Operators whose tensors may be on two devices."""
READING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
"""Operators whose result, or the size of it, the host waits for."""
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_AWAY = 1 << 60
"""Added to addresses, so that whoever reads one on the host fails."""


class PretendStorage:
    """The storage of a tensor on the device, which the host can identify and not read."""

    device = DEVICE

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage = storage
        self._cdata = storage._cdata

    def data_ptr(self) -> int:
        """An address on the device."""
        return self._storage.data_ptr() + _AWAY

    def nbytes(self) -> int:
        """Its size in bytes."""
        return self._storage.nbytes()

    size = nbytes


class PretendTensor(torch.Tensor):
    """A tensor on `cuda:0` whose values are on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls: type[PretendTensor], values: torch.Tensor) -> PretendTensor:
        # A view of a tensor made outside inference mode must be none of its own.
        with torch.inference_mode(False):
            made = torch.Tensor._make_wrapper_subclass(
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=DEVICE,
            )
        made.values = values
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.values!r})"

    def untyped_storage(self) -> Any:
        """As of every tensor."""
        return PretendStorage(self.values.untyped_storage())

    def data_ptr(self) -> int:
        """An address on the device."""
        return self.values.data_ptr() + _AWAY

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = PretendTensor(copy.deepcopy(self.values, memo))
            trainable = isinstance(self, nn.Parameter)
            made = nn.Parameter(copied, self.requires_grad) if trainable else copied.requires_grad_(self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: object) -> None:
        super().__setitem__(_with_tensors(index), value)

    def tolist(self) -> Any:
        """The values, which the host waits for."""
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(
        cls, func: torch._ops.OpOverload, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        return run(func, args, kwargs or {})


def run(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """The result of an operator on pretended tensors, or one that makes them."""
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_cuda and not isinstance(tensor, PretendTensor) for tensor in tensors):
        raise TypeError(f"{func} got a tensor on cuda:0 that is no PretendTensor; its data was set by `.data = `")
    _require_one_device(func, tensors)
    require_kernel(func, args)
    records = recording()
    if (records is not None or waiting_is_refused()) and _waits(func, tensors, kwargs):
        doing = (
            "called a synchronizing CUDA operation" if records is None else "operation not permitted when stream is capturing"
        )
        raise RuntimeError(f"CUDA error: {doing} ({func})")
    if func not in REFERENCES and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        # In inference mode these come here as they are.
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func.namespace not in OWN and func not in REFERENCES:
        # Its kernel for CUDA, or what it is written in: those operators come here in turn.
        return func.redispatch(_CUDA, *args, **kwargs)
    given_args, given_kwargs = pytree.tree_map(_on_cpu, (tuple(args), dict(kwargs)))
    compute = REFERENCES.get(func, func)
    result = compute(*given_args, **given_kwargs)
    if records is not None:
        records.add(compute, given_args, given_kwargs, result)
    if func is aten._to_copy.default and torch.device(kwargs.get("device") or args[0].device).type != "cuda":
        return result
    written = [_written(func, value, args, kwargs) for value in func._schema.returns]
    if any(value is not None for value in written):
        return written[0] if len(written) == 1 else tuple(written)
    return pytree.tree_map(lambda value: PretendTensor(value) if isinstance(value, torch.Tensor) else value, result)


def _written(func: torch._ops.OpOverload, value: torch._C.Argument, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """The argument that an operator writes to and returns; None for a new value."""
    if value.alias_info is None or not value.alias_info.is_write:
        return None
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set == value.alias_info.before_set:
            return kwargs[argument.name] if argument.name in kwargs else args[index]
    return None


def _with_tensors(index: object) -> Any:
    """An index whose lists are tensors: PyTorch would put them on the device past everything that could see it."""
    parts = (
        tuple(torch.tensor(part) if isinstance(part, list) else part for part in index) if isinstance(index, tuple) else index
    )
    return torch.tensor(parts) if isinstance(parts, list) else parts


def _on_cpu(value: object) -> object:
    if isinstance(value, PretendTensor):
        return value.values
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


def _require_one_device(func: torch._ops.OpOverload, tensors: Sequence[torch.Tensor]) -> None:
    if func in CROSSING:
        return
    found = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor) and tensor.dim() > 0]
    if func in _INDEXING:
        found = [tensor for tensor in found if tensor.is_floating_point() or tensor is tensors[0]]
    if found and any(isinstance(tensor, PretendTensor) for tensor in tensors):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and {found[0].device}! "
            f"({func}, {list(found[0].shape)})"
        )


def _waits(func: torch._ops.OpOverload, tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> bool:
    """True where the host waits for a value, or for a copy between it and the device."""
    masks = func in _INDEXING and any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    hosts = any(not isinstance(tensor, PretendTensor) and tensor.dim() > 0 for tensor in tensors)
    leaves = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "cuda"
    return func in READING or masks or hosts or leaves
