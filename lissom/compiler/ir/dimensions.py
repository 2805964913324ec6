"""The dimensions of a call's operands and results by name, from the operator's declaration (`lissom.ops.dimensions`).

PyTorch's operators are declared at the end of this file, Lissom's where they are defined.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import cast

import torch
from torch import fx

from lissom.compiler.ir import node as nodes
from lissom.compiler.ir import operators as families
from lissom.compiler.ir.dimension_text import Compound, Dim, Form, Pattern, forms_of, of_equation
from lissom.compiler.ir.types import Size, TensorType, product, quotient
from lissom.ops.dimensions import DECLARED, ROWS, Dimensions

aten = torch.ops.aten

Slot = int | str | tuple[int, int]
"""The place of an operand in a call: a position, a keyword, or a position and an index in the list there."""
_Given = tuple[str, Slot, fx.Node | None]
ShapeOf = Callable[[fx.Node], Sequence[Size]]
_TENSORS = ("Tensor", "Optional[Tensor]")


@dataclass(frozen=True)
class Operand:
    """A tensor that a call reads, its place in the call, and the names of its dimensions.

    Attributes:
        is_factor: the result is linear in it.
        is_added: it is added to the result.
        is_broadcast: it is neither.
        opaque: its layout is its own.
    """

    name: str
    slot: Slot
    node: fx.Node
    dims: tuple[Dim, ...]
    is_factor: bool
    is_added: bool
    is_broadcast: bool = False
    opaque: bool = False


@dataclass(frozen=True)
class Named:
    """A call with its operands and the names of its dimensions.

    Attributes:
        results: the names of each result's dimensions.
        fixed: those that are looked up or in order.
        sizes: by name; names behind `...` and of a star are numbered.
    """

    node: fx.Node
    operands: tuple[Operand, ...]
    results: tuple[tuple[Dim, ...], ...]
    sizes: Mapping[str, Size]
    declared: Dimensions
    fixed: frozenset[str]
    work: tuple[tuple[Dim, ...], ...] = field(default=(), repr=False)

    @cached_property
    def whole(self) -> frozenset[str]:
        """Dimensions that are read as a whole."""
        return self._numbered(self.declared.whole)

    @cached_property
    def normed(self) -> frozenset[str]:
        """Dimensions that a norm reads."""
        return self._numbered(self.declared.normed)

    @cached_property
    def positions(self) -> frozenset[str]:
        """Dimensions whose indices are positions."""
        return self._numbered(self.declared.positions)

    @cached_property
    def bound(self) -> frozenset[str]:
        """The dimensions within compounds that have parts of a given size or come one after another."""
        dims = [dim for dims in (*(operand.dims for operand in self.operands), *self.results) for dim in dims]
        compounds = [dim for dim in dims if isinstance(dim, Compound)]
        return frozenset(part for dim in compounds if not dim.product or any(map(str.isdigit, dim.parts)) for part in dim.parts)

    @cached_property
    def summed(self) -> tuple[str, ...]:
        """The dimensions that products are summed over."""
        kept = {part for dims in self.results for dim in dims for part in parts_of(dim)} | self.fixed | self.whole | self.normed
        return tuple(dict.fromkeys(name for _, _, name in self.places() if name and name not in kept))

    def places(self) -> Iterator[tuple[Operand, int, str]]:
        """Each operand, with each of its dimensions that has a name of its own."""
        for operand in self.operands:
            for dim, name in enumerate(operand.dims):
                if isinstance(name, str):
                    yield operand, dim, name

    def _numbered(self, names: str) -> frozenset[str]:
        wanted = names.split()
        return frozenset(name for name in self.sizes if name.partition(".")[0] in wanted)


def parts_of(dim: Dim) -> tuple[str, ...]:
    """The names that a dimension is made of."""
    return dim.parts if isinstance(dim, Compound) else (dim,)


def declaration(node: fx.Node) -> Dimensions | None:
    """The declaration of the operator that a node calls; None where it has none."""
    if node.target is aten.einsum.default:
        return of_equation(cast(str, node.args[0]))
    return _stored(node.target)


def _stored(target: object) -> Dimensions | None:
    return DECLARED.get(target) or ATEN.get(target)


def named(node: fx.Node, shape_of: ShapeOf | None = None) -> Named | None:
    """The call with its dimensions' names, sizes by `shape_of` or the nodes' types; None where no declared form fits."""
    declared = declaration(node)
    if declared is None:
        return None
    given, types = _given(node), nodes.node_type(node)
    shape: ShapeOf = shape_of or (lambda tensor: nodes.tensor_type(tensor).shape)
    shapes = [None if tensor is None else tuple(shape(tensor)) for _, _, tensor in given]
    several = isinstance(types, tuple)
    outputs = tuple(result.shape for result in types if isinstance(result, TensorType)) if several else (tuple(shape(node)),)
    for form in forms_of(declared.text):
        if form.condition is not None and bool(nodes.argument(node, form.condition[0])) != form.condition[1]:
            continue
        if (call := _bound(node, declared, form, given, shapes, outputs)) is not None:
            return call
    return None


def multiplications(node: fx.Node, shape_of: ShapeOf | None = None) -> Size | None:
    """The multiplications that a call is declared to take; None without such a declaration."""
    declared = declaration(node)
    if declared is None or node.target is aten.einsum.default or ":" not in declared.text:
        return None
    call, total = named(node, shape_of), cast(Size, 0)
    for term in call.work if call is not None else ():
        total = total + product([_amount(cast(Named, call), dim) for dim in term])
    return total


def counts(target: object) -> bool:
    """True for an operator whose multiplications are declared."""
    declared = _stored(target)
    return declared is not None and ":" in declared.text


def _amount(call: Named, dim: Dim) -> Size:
    """The size of a dimension in a term: of those behind `...`, or an argument of the call where no dimension has the name."""
    if isinstance(dim, Compound):
        sizes = [_amount(call, part) for part in dim.parts]
        return product(sizes) if dim.product else sum(cast("list[int]", sizes))
    if dim.isdigit():
        return int(dim)
    if dim in call.sizes:
        return call.sizes[dim]
    several = [size for name, size in call.sizes.items() if name.partition(".")[0] == dim.rstrip("*").replace("...", "")]
    if several or dim == "..." or dim.endswith("*"):
        return product(several)
    return cast(int, nodes.argument(call.node, dim))


@cache
def _tensors(target: torch._ops.OpOverload) -> tuple[tuple[str, int], ...]:
    """The tensors of an operator's schema: the name of each, and its place among positional arguments, -1 for none."""
    numbered = enumerate(target._schema.arguments)
    return tuple(
        (argument.name, -1 if argument.kwarg_only else index) for index, argument in numbered if str(argument.type) in _TENSORS
    )


def _given(node: fx.Node) -> list[_Given]:
    """The tensors of the schema with their places in the call and what it gives there."""
    if node.target is aten.einsum.default:
        return [("tensors", (1, index), tensor) for index, tensor in enumerate(cast("Sequence[fx.Node]", node.args[1]))]
    given: list[_Given] = []
    for name, place in _tensors(cast(torch._ops.OpOverload, node.target)):
        positional = 0 <= place < len(node.args)
        argument = node.args[place] if positional else node.kwargs.get(name)
        given.append((name, place if positional else name, argument if isinstance(argument, fx.Node) else None))
    return given


def _bound(
    node: fx.Node,
    declared: Dimensions,
    form: Form,
    given: Sequence[_Given],
    shapes: Sequence[tuple[Size, ...] | None],
    outputs: tuple[tuple[Size, ...], ...],
) -> Named | None:
    patterns = list(form.operands)
    if patterns[-1].opaque:
        patterns += patterns[-1:] * (len(given) - len(patterns))
    if len(patterns) != len(given):
        raise ValueError(f"{node.target} has {len(given)} tensors, not the {len(patterns)} declared: {declared.text}")
    there = [
        (name, slot, tensor, shape, pattern)
        for (name, slot, tensor), shape, pattern in zip(given, shapes, patterns, strict=True)
        if tensor is not None and shape is not None
    ]
    many = declared.many.items()
    fitted = _fitted(
        tuple(pattern for *_, pattern in there),
        tuple(shape for _, _, _, shape, _ in there),
        form.results,
        outputs,
        tuple((name, len(cast("Sequence[object]", nodes.argument(node, by)))) for name, by in many) if many else (),
    )
    if fitted is None:
        return None
    read, made, sizes = fitted
    operands = [
        Operand(
            *(name, slot, tensor, dims, name in declared.factors),
            *(pattern.mark == "+", pattern.mark == "~", pattern.opaque),
        )
        for (name, slot, tensor, _, pattern), dims in zip(there, read, strict=True)
    ]
    return Named(node, tuple(operands), made, sizes, declared, form.fixed, form.work)


@lru_cache(maxsize=4096)
def _fitted(
    patterns: Sequence[Pattern],
    shapes: Sequence[Sequence[Size]],
    results: Sequence[Pattern],
    outputs: Sequence[Sequence[Size]],
    many: Sequence[tuple[str, int]],
) -> tuple[list[tuple[Dim, ...]], tuple[tuple[Dim, ...], ...], Mapping[str, Size]] | None:
    """The names of each operand's dimensions and of each result's, and their sizes; None where the form does not fit.

    Layers of a model are alike, so most calls ask for what another has asked before.
    """
    stars = dict(many)
    read = [
        ("",) * len(shape) if pattern.opaque else _expanded(pattern, len(shape), stars)
        for pattern, shape in zip(patterns, shapes, strict=True)
    ]
    made = [_expanded(pattern, len(shape), stars) for pattern, shape in zip(results, outputs, strict=False)]
    if len(outputs) != len(results) or any(dims is None for dims in (*read, *made)):
        return None
    named_read, named_made = cast("list[tuple[Dim, ...]]", read), cast("list[tuple[Dim, ...]]", made)
    sizes = _sizes(named_read, shapes)
    if sizes is None:
        return None
    for dims, shape in zip(named_made, outputs, strict=True):
        # What stands on the right only, such as the rows of a packed weight, has the size of the result.
        sizes |= {dim: size for dim, size in zip(dims, shape, strict=True) if isinstance(dim, str) and dim not in sizes}
    settled = [_settled(dims, shape, sizes) for dims, shape in zip(named_read, shapes, strict=True)]
    return settled, tuple(_settled(dims, None, sizes) for dims in named_made), sizes


def _expanded(pattern: Pattern, rank: int, stars: Mapping[str, int]) -> tuple[Dim, ...] | None:
    """The names of a tensor's dimensions, those behind `...` and stars numbered; None where the rank is another.

    Dimensions behind `...` are numbered from the last, since they are broadcast.
    """
    dims: list[Dim] = []
    for dim in pattern.dims:
        starred = isinstance(dim, str) and dim.endswith("*")
        name = dim.rstrip("*") if isinstance(dim, str) else ""
        dims += [f"{name}.{index}" for index in range(stars[name])] if starred else [dim]
    if pattern.optional and rank == len(dims) - 1 - ("..." in dims):
        dims.pop()
    if "..." in dims:
        at, missing = dims.index("..."), rank - len(dims) + 1
        dims[at : at + 1] = [f".{index}" for index in range(missing, 0, -1)]
    if pattern.mark and rank < len(dims):
        dims = dims[len(dims) - rank :]
    return tuple(dims) if len(dims) == rank else None


def _sizes(dims: Sequence[Sequence[Dim]], shapes: Sequence[Sequence[Size]]) -> dict[str, Size] | None:
    """The size of each name; None where two sizes contradict each other. A size of 1 is broadcast."""
    sizes: dict[str, Size] = {}
    pairs = [pair for names, shape in zip(dims, shapes, strict=True) for pair in zip(names, shape, strict=True)]
    for dim, size in pairs:
        if not isinstance(dim, str) or not dim:
            continue
        if dim.isdigit():
            if size != int(dim):
                return None
        elif sizes.get(dim, 1) == 1:
            sizes[dim] = size
        elif size != 1 and isinstance(size, int) and isinstance(sizes[dim], int) and size != sizes[dim]:
            return None
    compounds = [(dim, size) for dim, size in pairs if isinstance(dim, Compound)]
    return sizes if all(_solved(dim, size, sizes) for dim, size in compounds) else None


def _solved(dim: Compound, size: Size, sizes: dict[str, Size]) -> bool:
    """Give the one unknown part of a compound its size; False where there is none that fits."""
    known = [int(part) if part.isdigit() else sizes[part] for part in dim.parts if part.isdigit() or part in sizes]
    unknown = [part for part in dim.parts if not part.isdigit() and part not in sizes]
    if len(set(unknown)) > 1:
        return False
    if dim.product:
        rest = quotient(size, product(known))
        if rest is None or (not unknown and rest != 1) or len(unknown) > 1:
            return False
    else:
        if not isinstance(size, int) or not all(isinstance(part_size, int) for part_size in known):
            return False
        left = size - sum(cast("list[int]", known))
        if left < 0 or left % (len(unknown) or 1) or (not unknown and left):
            return False
        rest = left // (len(unknown) or 1)
    sizes |= dict.fromkeys(unknown, rest)
    return True


def _settled(dims: Sequence[Dim], shape: Sequence[Size] | None, sizes: Mapping[str, Size]) -> tuple[Dim, ...]:
    """The names without those that are broadcast here, and compounds without parts of size 1."""
    names: list[Dim] = []
    for index, dim in enumerate(dims):
        if isinstance(dim, Compound):
            parts = tuple(part for part in dim.parts if part.isdigit() or sizes[part] != 1)
            names.append(Compound(parts, dim.product) if len(parts) > 1 else parts[0] if parts else dim.parts[0])
        elif dim.isdigit() or (shape is not None and shape[index] == 1 and sizes.get(dim, 1) != 1):
            names.append("")
        else:
            names.append(dim)
    return tuple(names)


def check_declaration(target: torch._ops.OpOverload, declared: Dimensions) -> None:
    """Compare a declaration with the operator's schema. Raises ValueError, which names the operator and what does not fit."""
    tensors, names = _tensors(target), {argument.name for argument in target._schema.arguments}
    for form in forms_of(declared.text):
        several = form.operands[-1].opaque
        if len(form.operands) > len(tensors) or (len(form.operands) < len(tensors) and not several):
            raise ValueError(f"{target} has {len(tensors)} tensors, and {len(form.operands)} are declared: {declared.text!r}")
        if len(form.results) != len(target._schema.returns):
            raise ValueError(f"{target} returns {len(target._schema.returns)} values: {declared.text!r}")
        asked = {*declared.many.values(), *([form.condition[0]] if form.condition else [])}
        if unknown := asked - names:
            raise ValueError(f"{target} has no argument {', '.join(sorted(unknown))}: {declared.text!r}")
    used = set(" ".join((declared.whole, declared.normed, declared.positions, *declared.many)).split())
    if unknown := used - set(re.findall(r"[a-z_]+", declared.text)):
        raise ValueError(f"{target} has no dimension {', '.join(sorted(unknown))}: {declared.text!r}")
    if not set(declared.factors) & {name for name, _ in tensors} and declared.factors:
        raise ValueError(f"{target} has no tensor {', '.join(declared.factors)}")


def contradiction(node: fx.Node) -> str | None:
    """The declared and the returned sizes of a call, where they differ; None where they agree."""
    types = nodes.node_type(node)
    if (call := named(node)) is None:
        return None
    for dims, result in zip(call.results, types if isinstance(types, tuple) else (types,), strict=True):
        sizes = tuple(_amount(call, dim) if dim else 1 for dim in dims)
        if sizes != nodes.tensor_type(result).shape:
            return f"{node.target} is declared to return {list(sizes)} and returns {list(nodes.tensor_type(result).shape)}"
    return None


_MATRICES = Dimensions(
    "k, k -> | k, ... k n -> ... n : ... n k | ... m k, k -> ... m | ... m k, ... k n -> ... m n : ... m n k",
    factors=("self", "other", "mat2"),
)
_ATTENDS = ": ... q d t + ... q t v"
_SHARED_HEADS = ": ... (g r) q d t + ... (g r) q t v"
ATEN: Mapping[object, Dimensions] = {
    aten.linear.default: Dimensions("... k, n k, +n -> ... n : ... n k", factors=("input", "weight")),
    **dict.fromkeys(families.MATMULS, _MATRICES),
    aten.addmm.default: Dimensions("+m n, m k, k n -> m n : m n k", factors=("mat1", "mat2")),
    aten.baddbmm.default: Dimensions("+b m n, b m k, b k n -> b m n : b m n k", factors=("batch1", "batch2")),
    aten._int_mm.default: Dimensions("m k, k n -> m n : m n k"),
    aten._scaled_mm.default: Dimensions("m k, k n, _ -> m n : m n k"),
    aten._grouped_mm.default: Dimensions("rows k, groups k n, _ -> rows n : rows k n"),
    **dict.fromkeys((aten._weight_int4pack_mm.default, aten._weight_int8pack_mm.default), ROWS),
    aten.embedding.default: Dimensions("!rows f, ... -> ... f", factors=("weight",)),
    aten.scaled_dot_product_attention.default: Dimensions(
        f"... q d, ... t d, ... t v, ~... q t -> ... q v {_ATTENDS}"
        f"| ... (g r) q d, ... g t d, ... g t v, ~... (g r) q t -> ... (g r) q v {_SHARED_HEADS}",
        factors=("value",),
        whole="t",
        positions="q",
    ),
    aten.layer_norm.default: Dimensions(
        "... f*, f*, +f* -> ... f*", ("input", "weight"), normed="f", centred=True, many={"f": "normalized_shape"}
    ),
    aten.rms_norm.default: Dimensions("... f*, f* -> ... f*", ("input", "weight"), normed="f", many={"f": "normalized_shape"}),
}
"""The declarations of PyTorch's operators."""
