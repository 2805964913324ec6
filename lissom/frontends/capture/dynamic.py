"""Dynamic dimensions: those named in `dynamic=`, and the notes on those found."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from lissom.compiler.ir.fake import fake_mode
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.signature import Signature, TensorArgument
from lissom.errors import CaptureError
from lissom.frontends.capture.cache_lengths import CacheLengths
from lissom.frontends.capture.failures import TORCH_FOLDER, line_text

Dynamic = Mapping[str, Mapping[int, "str | Dim"]]
_SIZE = re.compile(r"L\['(?P<name>\w+)'\](?P<rest>.*)\.size\(\)\[(?P<dim>\d+)\]")
"""The name that torch.export gives to the size of an input."""
_EXAMPLE = '{"input_ids": {0: "batch"}}'


def check_dynamic(dynamic: object) -> None:
    """Refuse a `dynamic=` that is not True, False, or a mapping from arguments to dimensions to names. Raises CaptureError."""
    if isinstance(dynamic, bool):
        return
    if not isinstance(dynamic, Mapping):
        raise CaptureError(f"dynamic= is {dynamic!r:.80}; give True, False, or a mapping such as {_EXAMPLE}")
    for name, dims in dynamic.items():
        if not isinstance(name, str):
            raise CaptureError(f"dynamic has the key {name!r:.80}; keys are the names of arguments, such as {_EXAMPLE}")
        if not isinstance(dims, Mapping):
            raise CaptureError(f"dynamic gives {dims!r:.80} for '{name}'; give the dimensions by number, such as {_EXAMPLE}")
        for index, given in dims.items():
            if isinstance(index, bool) or not isinstance(index, int):
                raise CaptureError(
                    f"dynamic names the dimension {index!r:.80} of '{name}'; dimensions are counted from 0, such as {_EXAMPLE}"
                )
            if not isinstance(given, Dim) and not (isinstance(given, str) and given.isidentifier()):
                raise CaptureError(
                    f"dynamic gives {given!r:.80} for dimension {index} of '{name}'; give a name, or Dim(name, min=, max=)"
                )


@dataclass(frozen=True)
class Named:
    """The dimensions a caller names, by the position of their input among the leaves of the call."""

    given: Mapping[int, Mapping[int, str | Dim]]

    @property
    def names(self) -> dict[tuple[int, int], str]:
        """The name of each, by position and dimension."""
        return {
            (position, index): dim if isinstance(dim, str) else dim.__name__
            for position, dims in self.given.items()
            for index, dim in dims.items()
        }


def wanted_dimensions(dynamic: Dynamic, arguments: Mapping[str, object], bound: Mapping[str, object]) -> Named:
    """The dimensions the caller names. A name is that of an argument, or of a part of one as signatures print it.

    Args:
        arguments: as the signature names them, in the order of the call.
        bound: as `forward` names them, `*args` as one.

    Raises:
        CaptureError: for an unknown argument or dimension, and for an example size outside its range.
    """
    parts = _parts(arguments, bound)
    wanted: dict[int, dict[int, str | Dim]] = {}
    for name, dims in sorted(
        dynamic.items(), key=lambda entry: len(parts.get(entry[0], ())), reverse=True
    ):  # whole before part
        if name not in parts:
            known = [part for part in parts if name.startswith(part) and part != name]
            has = [part for part in parts if known and part.startswith(known[-1])] or list(arguments)
            raise CaptureError(f"dynamic names '{name}', which is not an argument of this call; it has {', '.join(has)}")
        tensors = parts[name]
        rank = min((tensor.dim() for _, tensor in tensors), default=0)
        for index, given in dims.items():
            if not 0 <= index < rank:
                raise CaptureError(f"dynamic names dimension {index} of '{name}', which has {rank}, counted from 0")
            outside = next((tensor.shape[index] for _, tensor in tensors if not _in_range(given, tensor.shape[index])), None)
            if outside is not None:
                raise CaptureError(
                    f"the example has size {outside} in dimension {index} of '{name}', outside of the range dynamic= gives "
                    f"it; pass an example inside"
                )
            for position, _ in tensors:
                wanted.setdefault(position, {})[index] = given
    return Named(wanted)


def _parts(arguments: Mapping[str, object], bound: Mapping[str, object]) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """The tensors of each argument and of each part of one, `past`, `past[0]` and `past[0][0]`, with their positions."""
    tensors_of: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in (*arguments, *bound)}
    position = 0
    owners = {id(leaf): name for name, value in bound.items() if name not in arguments for leaf in pytree.tree_leaves(value)}
    for name, value in arguments.items():
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            if isinstance(leaf, torch.Tensor):
                names = [name + pytree.keystr(path[:end]) for end in range(len(path) + 1)]
                for part in (*names, *([owners[id(leaf)]] if id(leaf) in owners else ())):
                    tensors_of.setdefault(part, []).append((position, leaf))
            position += 1
    return tensors_of


def traced_inputs(
    leaves: Sequence[object], dims: Mapping[int, Mapping[int, object]], lengths: CacheLengths | None
) -> list[object]:
    """The inputs to trace with: where a dynamic size is 1 in all of them it is doubled, because export specializes it.

    Every tensor is a new object: export would take one that is given twice for one input, and an export that fails leaves its
    marks of dynamic dimensions on tensors.
    """
    tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    sizes = {(place, dim): leaf.shape[dim] for place, leaf in tensors.items() for dim in dims.get(id(leaf), ())}
    larger = {dim for (_, dim), size in sizes.items() if size != 1}
    wanted = {place: 2 if place[1] not in larger else size for place, size in sizes.items()}
    if lengths is not None:
        wanted |= {place: size for place, size in lengths.traced(frozenset(sizes)).items() if place in sizes}
    traced = [leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    for (place, dim), size in wanted.items():
        if size != sizes[place, dim]:
            tensor = traced[place]
            assert isinstance(tensor, torch.Tensor)
            traced[place] = tensor.index_select(dim, torch.arange(size, device=tensor.device) % sizes[place, dim])
    return traced


def _in_range(given: str | Dim, size: int) -> bool:
    return isinstance(given, str) or bool(given.min <= size <= given.max)


def renamed(program: Program, named: Named, lines: Mapping[tuple[str, int], str]) -> Program:
    """The program with the caller's names and ranges on its dimensions.

    Args:
        lines: that fix a size, see `lines_that_fix`.

    Raises:
        CaptureError: if the model fixes a dimension that should vary, two dimensions get the same name, one gets two, or the
            size of one with a range follows from others.
    """
    signature = program.signature
    dimensions, names_of = dict(signature.dimensions), dict[sympy.Symbol, str]()
    sums: list[tuple[str, sympy.Expr]] = []
    leaves = [leaf for argument in (*signature.positional, *signature.keyword) for leaf in argument.leaves]
    tensors = [(position, leaf) for position, leaf in enumerate(leaves) if isinstance(leaf, TensorArgument)]
    for position, leaf in tensors:
        for index, wanted in named.given.get(position, {}).items():
            size = leaf.type.shape[index]
            name = wanted if isinstance(wanted, str) else wanted.__name__
            if isinstance(size, int):
                line = lines.get((leaf.path, index))
                raise CaptureError(
                    f"dimension {index} ({name}) of '{leaf.path}' was to be dynamic, but "
                    + ("the model" if line is None else f"{line} takes it as a number and")
                    + f" fixes it at {size}; leave it out of dynamic="
                )
            if not isinstance(size, sympy.Symbol) or size not in dimensions:
                if not isinstance(wanted, str):
                    sums.append((f"dimension {index} ({name}) of '{leaf.path}'", size))
                continue
            if names_of.setdefault(size, name) != name:
                raise CaptureError(
                    f"dynamic gives the names '{names_of[size]}' and '{name}' to dimensions that the model takes as equal; "
                    f"give them one name"
                )
            dimension = replace(dimensions[size], name=name)
            if not isinstance(wanted, str):
                bounds = [bound for bound in (wanted.max, dimension.maximum) if isinstance(bound, int)]
                dimension = replace(dimension, minimum=max(wanted.min, dimension.minimum), maximum=min(bounds, default=None))
            dimensions[size] = dimension
    names = [dimension.name for dimension in dimensions.values()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CaptureError(
            f"dynamic gives the name '{twice}' to dimensions that vary independently; give each a name of its own"
        )
    program.signature = replace(signature, dimensions=dimensions)
    for where, size in sums:
        raise CaptureError(
            f"{where} is {program.signature.name_of(size)} in this model; give it a name without a range, and ranges to those"
        )
    return program


def describe_dimensions(signature: Signature) -> str:
    """A note on the dynamic dimensions, `dynamic: batch (1 or more)`."""
    if not signature.dimensions:
        return "every size is fixed at the example's"
    return "dynamic: " + ", ".join(f"{dimension.name} ({dimension.range})" for dimension in signature.dimensions.values())


def mask_dimensions(tensors: Sequence[torch.Tensor]) -> dict[int, tuple[int, ...]]:
    """The trailing dimensions of masks such as [batch, 1, tokens, tokens] that equal another input's tokens, by input `id`."""
    lengths = {tensor.shape[1] for tensor in tensors if tensor.dim() in (2, 3)} - {1}
    trailing: dict[int, tuple[int, ...]] = {}
    for tensor in tensors:
        first, last = (tensor.dim() - 2, tensor.dim() - 1)
        if tensor.dim() >= 3 and tensor.shape[last] in lengths and tensor.shape[first] in {1, tensor.shape[last]}:
            trailing[id(tensor)] = tuple(dim for dim in (first, last) if tensor.shape[dim] > 1)
    return trailing


def lines_that_fix(exported: ExportedProgram) -> dict[tuple[str, int], str]:
    """The model's line that took a dynamic size as a number, as `len(x)` or `int(x.shape[0])` do, by input path and dimension.

    torch.export fixes such a size at the example's without an error. Its record is internal, and empty where it changed.
    """
    env = fake_mode(exported.graph).shape_env
    fixing: dict[tuple[str, int], str] = {}
    for symbol, value in getattr(env, "replacements", {}).items():
        sources = getattr(env, "var_to_sources", {}).get(symbol, ())
        where = getattr(getattr(env, "replacements_slocs", {}).get(symbol), "framework_loc", None)
        if not value.is_number or not sources or not isinstance(where, traceback.FrameSummary):
            continue
        matched = _SIZE.fullmatch(str(sources[0].name))
        # A line of torch's own is where a weight or an operator needs the size.
        if matched is not None and not where.filename.startswith(TORCH_FOLDER):
            line = line_text(where.filename, where.lineno, where.line)
            fixing[matched["name"] + matched["rest"], int(matched["dim"])] = line
    return fixing


def fixed_sizes(signature: Signature, lines: Mapping[tuple[str, int], str]) -> list[str]:
    """Notes on dimensions that the model fixes: the batch, the sequence of token ids, and those with a known line."""
    notes: list[str] = []
    for leaf in signature.tensors:
        for index, size in enumerate(leaf.type.shape):
            line = lines.get((leaf.path, index))
            if size == 0:
                notes.append(f"dimension {index} of '{leaf.path}' is fixed at 0: give an example with values there")
            elif isinstance(size, int) and line is not None:
                notes.append(f"dimension {index} of '{leaf.path}' is fixed at {size}: {line} takes it as a number; use x.shape")
            elif isinstance(size, int) and index == 1 and len(leaf.type.shape) == 2 and not leaf.type.dtype.is_floating_point:
                notes.append(
                    f"dimension 1 of '{leaf.path}' is fixed at {size}: the model combines it with sizes that do not vary"
                )
    return notes


def declared_but_fixed(model: nn.Module, signature: Signature) -> list[str]:
    """Notes on sizes fixed here that are dynamic in the model's file (`meta["dynamic"]`, as from ONNX)."""
    declared: Mapping[str, Mapping[int, str]] = getattr(model, "meta", {}).get("dynamic", {})
    notes: list[str] = []
    for leaf in signature.tensors:
        tried = (0, 1) if len(leaf.type.shape) in (2, 3) else (0,)
        for index, name in declared.get(leaf.path, {}).items():
            if isinstance(leaf.type.shape[index], int):
                reason = "constants in its graph fix it" if index in tried else "name it in dynamic= to let it vary"
                fixed = f"dimension {index} of '{leaf.path}' at {leaf.type.shape[index]}"
                notes.append(f"{fixed}: it varies in the file ({name}), but {reason}")
    return notes
