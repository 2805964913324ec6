"""The signature of a program: names, nesting and dtypes of inputs and outputs, and the ranges of dynamic sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import sympy
import torch
from torch.utils import _pytree as pytree

from lissom.compiler.ir import resizing
from lissom.compiler.ir.types import Size, TensorType, format_type
from lissom.errors import InputError, nearest

Sizes = Mapping[sympy.Symbol, int]


@dataclass(frozen=True)
class Dimension:
    """A size that may vary from call to call; `maximum` is None when it is unbounded."""

    name: str
    minimum: int
    maximum: int | None

    @property
    def range(self) -> str:
        return f"{self.minimum} or more" if self.maximum is None else f"{self.minimum} to {self.maximum}"

    def at_most(self, size: int) -> int:
        """The size, or the maximum when that is smaller."""
        return size if self.maximum is None else min(size, self.maximum)

    def allows(self, size: int) -> bool:
        """True for a size in the range."""
        return size >= self.minimum and self.at_most(size) == size


@dataclass(frozen=True)
class TensorArgument:
    """One tensor the program takes; `path` is how the caller writes it, `past[0].key`."""

    path: str
    type: TensorType


@dataclass(frozen=True)
class ConstantArgument:
    """A number, flag, string or None that was fixed when the program was captured."""

    path: str
    value: object


Leaf = TensorArgument | ConstantArgument


@dataclass(frozen=True)
class Argument:
    """One argument of the call: its name, its nesting, and the leaves in it, in order."""

    name: str
    spec: pytree.TreeSpec
    leaves: tuple[Leaf, ...]

    @property
    def constant(self) -> bool:
        return all(isinstance(leaf, ConstantArgument) for leaf in self.leaves)


@dataclass(frozen=True)
class Signature:
    """The call signature of a program.

    Attributes:
        positional: the positional arguments as they were given at capture, in order.
        keyword: the keyword arguments, likewise.
        parameters: the names of the original `forward`, in order, so that either way of passing them works.
        out_spec: the nesting of what is returned.
        dimensions: the dynamic sizes. Sizes derived from others appear only in the arguments' types.
        conditions: relations between sizes found during capture, such as a sequence divisible by a block.
    """

    positional: tuple[Argument, ...]
    keyword: tuple[Argument, ...]
    parameters: tuple[str, ...]
    out_spec: pytree.TreeSpec
    dimensions: Mapping[sympy.Symbol, Dimension]
    conditions: tuple[sympy.Basic, ...] = ()

    @property
    def tensors(self) -> tuple[TensorArgument, ...]:
        """The tensor leaves in the order of the program's placeholders."""
        arguments = (*self.positional, *self.keyword)
        return tuple(leaf for argument in arguments for leaf in argument.leaves if isinstance(leaf, TensorArgument))

    def name_of(self, expression: sympy.Basic) -> str:
        """The expression with the dimensions' names in it, `batch*sequence`."""
        known = self._named.get(expression)
        if known is None:
            names = {symbol: sympy.Symbol(dimension.name) for symbol, dimension in self.dimensions.items()}
            known = self._named[expression] = str(expression.xreplace(names))
        return known

    @cached_property
    def _named(self) -> dict[sympy.Basic, str]:
        """A cache for `name_of`: a program's text names each expression many times."""
        return {}

    def describe(self) -> str:
        """The signature as text, `(input_ids: i64[batch, sequence], *, use_cache=False)`."""
        shown = [self._describe(argument) for argument in self.positional]
        if self.keyword:
            shown += ["*", *(self._describe(argument) for argument in self.keyword)]
        return f"({', '.join(shown)})"

    def _describe(self, argument: Argument) -> str:
        if argument.constant:
            return f"{argument.name}={pytree.tree_unflatten([_constant(leaf) for leaf in argument.leaves], argument.spec)!r}"
        leaves = [
            f"{leaf.path}: {format_type(leaf.type, self.name_of)}"
            if isinstance(leaf, TensorArgument)
            else f"{leaf.path}={leaf.value!r}"
            for leaf in argument.leaves
        ]
        return leaves[0] if len(leaves) == 1 else "{" + ", ".join(leaves) + "}"

    def flatten(self, args: Sequence[object], kwargs: Mapping[str, object]) -> list[torch.Tensor]:
        """The call's tensors in the order of the program's placeholders, checked against the signature.

        Raises:
            InputError: one sentence naming the argument, what was found and what is allowed.
        """
        tensors = [tensor for argument, given in self._bind(args, kwargs) for tensor in self._leaves_of(argument, given)]
        self.check_sizes(tensors)
        return tensors

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
        """The positional and keyword arguments whose tensors, in order, are these; the inverse of `flatten`."""
        feed = iter(tensors)

        def build(argument: Argument) -> object:
            leaves = [next(feed) if isinstance(leaf, TensorArgument) else leaf.value for leaf in argument.leaves]
            return pytree.tree_unflatten(leaves, argument.spec)

        return tuple(map(build, self.positional)), {argument.name: build(argument) for argument in self.keyword}

    def unflatten(self, values: Sequence[object]) -> object:
        """The returned values in the structure the original model returns."""
        return pytree.tree_unflatten(list(values), self.out_spec)

    def _bind(self, args: Sequence[object], kwargs: Mapping[str, object]) -> list[tuple[Argument, object]]:
        names = (*(argument.name for argument in self.positional), *self.parameters[len(self.positional) :])
        if len(args) > len(names):
            raise InputError(f"{len(args)} positional arguments given; the program takes {self.describe()}")
        given = dict(zip(names, args, strict=False))
        twice = next((name for name in kwargs if name in given), None)
        if twice:
            raise InputError(f"argument '{twice}' is given twice, by position and by name; give it once")
        given.update(kwargs)
        items = (*self.positional, *self.keyword)
        captured = {argument.name for argument in items}
        for name, value in given.items():
            if name in captured or (value is None and name in self.parameters):
                continue
            self._refuse_extra(name, captured)
        return [(argument, self._take(argument, given)) for argument in items]

    def _take(self, argument: Argument, given: Mapping[str, object]) -> object:
        if argument.name in given:
            return given[argument.name]
        if argument.constant:
            return pytree.tree_unflatten([_constant(leaf) for leaf in argument.leaves], argument.spec)
        raise InputError(f"argument '{argument.name}' is missing; the program takes {self.describe()}")

    def _refuse_extra(self, name: str, captured: set[str]) -> NoReturn:
        if name in self.parameters:
            raise InputError(
                f"argument '{name}' was not among the example inputs, so the program does not have it; "
                f"it takes {self.describe()}: add '{name}' to example_inputs and compile again"
            )
        raise InputError(f"there is no argument '{name}'{nearest(name, captured) or ';'} the program takes {self.describe()}")

    def _leaves_of(self, argument: Argument, given: object) -> list[torch.Tensor]:
        if isinstance(given, torch.Tensor) and len(argument.leaves) == 1:
            values: list[object] = [given]
        else:
            values, spec = pytree.tree_flatten(given)
            if spec != argument.spec:
                raise InputError(
                    f"argument '{argument.name}' is nested as {_nesting(given)}; "
                    f"the program takes {_nesting(pytree.tree_unflatten(list(argument.leaves), argument.spec))}"
                )
        tensors = []
        for leaf, value in zip(argument.leaves, values, strict=True):
            if isinstance(leaf, TensorArgument):
                tensors.append(self._check_tensor(leaf, value))
            elif value is not leaf.value and not _equal(value, leaf.value):
                description = f"a {type(value).__name__}" if hasattr(value, "shape") else f"{value!r:.80}"
                raise InputError(
                    f"argument '{leaf.path}' is {description}; the program was captured with {leaf.value!r} fixed: "
                    f"pass {leaf.value!r}, or compile again with {description} among the example inputs"
                )
        return tensors

    def _check_tensor(self, leaf: TensorArgument, value: object) -> torch.Tensor:
        wanted = leaf.type
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"argument '{leaf.path}' is a {type(value).__name__}; the program takes a tensor, "
                f"{format_type(wanted, self.name_of)}"
            )
        if type(value) not in _PLAIN and not value.is_nested:
            value = self._plain(leaf, value)
        if value.layout is not torch.strided or value.is_nested:
            kind = "nested" if value.is_nested else f"of layout {value.layout}"
            raise InputError(
                f"argument '{leaf.path}' is a tensor that is {kind}; the program takes a dense tensor, "
                f"{format_type(wanted, self.name_of)}: call .to_dense() or pad it"
            )
        if value.dtype is wanted.dtype and value.dim() == len(wanted.shape) and value.device == wanted.device:
            # Kernels read memory as it is, and a view such as `z.conj().imag` is the negative of what is in memory.
            return value.resolve_neg() if value.is_neg() else value
        actual = format_type(TensorType(value.dtype, tuple(value.shape), value.device), str)
        advice = f"move it with .to('{wanted.device}')" if value.device != wanted.device else "pass that dtype and rank"
        raise InputError(f"argument '{leaf.path}' is {actual}; the program takes {format_type(wanted, self.name_of)}: {advice}")

    def _plain(self, leaf: TensorArgument, value: torch.Tensor) -> torch.Tensor:
        """A tensor of a subclass as a torch.Tensor of the same memory. Raises InputError where the subclass runs operators."""
        kind = type(value)
        if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # pyright: ignore[reportAttributeAccessIssue]
            raise InputError(
                f"argument '{leaf.path}' is a {kind.__name__}, which runs operators itself; the program takes a plain tensor, "
                f"{format_type(leaf.type, self.name_of)}"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(torch.Tensor)

    def check_sizes(self, tensors: Sequence[torch.Tensor]) -> None:
        """Check sizes against the signature.

        Raises:
            InputError: naming the argument and dimension, the size found and the sizes allowed.
        """
        sizes: dict[sympy.Symbol, int] = {}
        derived: list[tuple[TensorArgument, int, sympy.Expr, int]] = []
        for leaf, tensor in zip(self.tensors, tensors, strict=True):
            for index, (size, actual) in enumerate(zip(leaf.type.shape, tensor.shape, strict=True)):
                if isinstance(size, int):
                    if size != actual:
                        self._refuse_size(leaf, index, actual, str(size))
                elif isinstance(size, sympy.Symbol) and size not in sizes:
                    sizes[size] = actual
                    if not self.dimensions[size].allows(actual):
                        self._refuse_size(leaf, index, actual, self.dimensions[size].range)
                elif isinstance(size, sympy.Symbol):
                    if sizes[size] != actual:
                        wanted = f"{sizes[size]}, the {self.dimensions[size].name} of another argument in this call"
                        self._refuse_size(leaf, index, actual, wanted)
                else:
                    derived.append((leaf, index, size, actual))
        for leaf, index, size, actual in derived:
            if evaluate(size, sizes) != actual:
                self._refuse_size(leaf, index, actual, self.name_of(size))
        for condition in self.conditions:
            if not _may_hold(condition, sizes):
                given = ", ".join(f"{self.dimensions[symbol].name} = {size}" for symbol, size in sizes.items())
                raise InputError(
                    f"sizes {given} break a condition found while capturing the model, "
                    f"{self.name_of(condition)}; pass sizes that meet it"
                )

    def _refuse_size(self, leaf: TensorArgument, index: int, actual: int, allowed: str) -> NoReturn:
        size = leaf.type.shape[index]
        label = f" ({self.name_of(size)})" if isinstance(size, sympy.Basic) else ""
        advice = "" if label else "; compile again with an example of that size, or mark the dimension dynamic"
        raise InputError(f"argument '{leaf.path}' has size {actual} in dimension {index}{label}; allowed: {allowed}{advice}")

    def sizes_of(self, tensors: Sequence[torch.Tensor]) -> dict[sympy.Symbol, int]:
        """The size of each dimension in these inputs."""
        sizes: dict[sympy.Symbol, int] = {}
        for leaf, tensor in zip(self.tensors, tensors, strict=True):
            for size, actual in zip(leaf.type.shape, tensor.shape, strict=True):
                if isinstance(size, sympy.Symbol):
                    sizes[size] = actual
        return sizes

    @property
    def batch(self) -> sympy.Symbol | None:
        """The first dimension of the first input, if it is dynamic."""
        first = next((leaf.type.shape[0] for leaf in self.tensors if leaf.type.shape), None)
        return first if isinstance(first, sympy.Symbol) else None

    @property
    def lengths(self) -> list[sympy.Symbol]:
        """The dynamic dimensions without the batch, unless it is the only one."""
        return [symbol for symbol in self.dimensions if symbol != self.batch] or [*self.dimensions]

    def scaled(self, example: Sequence[torch.Tensor], factor: int) -> dict[sympy.Symbol, int]:
        """The example's sizes times a factor, at most the largest allowed."""
        return {symbol: self.dimensions[symbol].at_most(size * factor) for symbol, size in self.sizes_of(example).items()}

    def resize(self, example: Sequence[torch.Tensor], sizes: Sizes, seed: int = 0) -> list[torch.Tensor]:
        """The example with the dynamic dimensions in `sizes` at these.

        Rows and positions are drawn from the example's own, so token ids stay inside the vocabulary and masks stay masks. Each
        row draws other positions, the same in every argument that shares the dimensions. Position ids continue to count up.
        """
        shapes = self._shapes_at({**self.sizes_of(example), **sizes})
        return resizing.drawn(example, [leaf.type.shape for leaf in self.tensors], shapes, seed)

    def sample_at(self, example: Sequence[torch.Tensor], sizes: Sizes, seed: int = 0) -> list[torch.Tensor] | None:
        """The example resized; None when the signature refuses these sizes."""
        try:
            sample = self.resize(example, sizes, seed)
            self.check_sizes(sample)
        except InputError:
            return None
        return sample

    def thinned(self, sample: Sequence[torch.Tensor], sizes: Sizes) -> list[torch.Tensor]:
        """Evenly spaced rows and positions of a sample, with the first and the last, so that padding stays where it is."""
        shapes = [leaf.type.shape for leaf in self.tensors]
        return list(map(resizing.thinned, sample, shapes, self._shapes_at(sizes)))

    def _shapes_at(self, sizes: Sizes) -> list[list[int]]:
        return [[evaluate(size, sizes) for size in leaf.type.shape] for leaf in self.tensors]


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _equal(value: object, captured: object) -> bool:
    """True if a constant equals the captured one. Integers and floats differ: operators return other dtypes for them."""
    if not isinstance(value, (bool, int, float, str)) or isinstance(value, float) != isinstance(captured, float):
        return False
    return value == captured or (value != value and captured != captured)


_NO_VALUE = (ArithmeticError, ValueError, TypeError, AttributeError, AssertionError)
"""The exceptions of sympy for an expression without a value at some sizes; an artifact may hold any expression."""


def _may_hold(condition: sympy.Basic, sizes: Sizes) -> bool:
    """False when the condition does not hold at these sizes, or has no value there."""
    try:
        return condition.xreplace(_integers(sizes)) != sympy.false
    except _NO_VALUE:
        return False


def evaluate(size: Size, sizes: Sizes) -> int:
    """The size as a number once every symbol has one. Raises InputError when it is no whole number at these sizes."""
    if isinstance(size, int):
        return size
    try:
        return int(str(size.xreplace(_integers(sizes))))
    except _NO_VALUE as error:
        given = ", ".join(f"{symbol} = {value}" for symbol, value in sizes.items())
        raise InputError(f"the size {size!s:.200} is no whole number where {given}; pass other sizes") from error


def _integers(sizes: Sizes) -> dict[sympy.Symbol, sympy.Integer]:
    return {symbol: sympy.Integer(size) for symbol, size in sizes.items()}


def _constant(leaf: Leaf) -> object:
    return leaf.value if isinstance(leaf, ConstantArgument) else leaf


def _nesting(tree: object) -> str:
    """The containers of a structure with its leaves left out, `{a: (*, *), b: [*]}`."""
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{key}: {_nesting(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        parts = ", ".join(map(_nesting, tree))
        return f"[{parts}]" if isinstance(tree, list) else f"({parts})"
    return "*"
