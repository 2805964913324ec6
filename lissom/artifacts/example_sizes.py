"""Sizes at the example for a program's text, which does not hold them: those at which the operators return the text's types."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from lissom.artifacts.text_scanner import Scanner
from lissom.compiler.ir.signature import evaluate
from lissom.compiler.ir.types import TensorType, ValueType
from lissom.errors import ArtifactError, InputError

_DEFAULTS = (4, 16, 8, 24, 32, 12)
"""No two alike, and divisible by small blocks."""
_MULTIPLES = (*range(1, 17), *(2**power for power in range(5, 13)))
"""A size is one of the defaults times one of these."""
_FACTORS = range(1, 9)
"""The sizes times each of these are tried, as a program may need a certain size, such as that of a table of positions."""
_MOST_STEP = 1 << 16
_CALL = re.compile(r"^  %\w+: ", re.MULTILINE)


def default_sizes(symbols: Mapping[str, sympy.Symbol], given: Mapping[str, int]) -> dict[str, int]:
    """A size for each symbol by name.

    Args:
        given: sizes that are known.
    """
    return dict(zip(symbols, _DEFAULTS * len(symbols), strict=False)) | dict(given)


def other_sizes(text: str, symbols: Mapping[str, sympy.Symbol], given: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Sizes to try where the defaults do not fit.

    Each is a multiple of the numbers that divide it, such as strides of convolutions, and so large that no tensor has a size
    below 2, as far as that can be had.
    """
    found = _tensor_sizes(text, symbols)
    defaults = default_sizes(symbols, given)
    chosen = dict(defaults)
    free = [name for name in symbols if name not in given][: len(_DEFAULTS)]
    for name in free:
        chosen[name] = _large_enough(name, chosen, symbols, found)
    tried = (chosen | {name: chosen[name] * factor for name in free} for factor in _FACTORS)
    yield from (sizes for sizes in tried if sizes != defaults)


def _large_enough(name: str, sizes: Mapping[str, int], symbols: Mapping[str, sympy.Symbol], found: Iterable[sympy.Expr]) -> int:
    """The least size for a symbol, unlike the others, that leaves the fewest sizes of tensors below 2."""
    symbol = symbols[name]
    concerned = [size for size in found if symbol in size.free_symbols]
    step = _divisor(symbol, concerned)
    others = {size for other, size in sizes.items() if other != name}

    def small(size: int) -> int:
        values = {symbols[other]: size if other == name else known for other, known in sizes.items()}
        return sum(_is_small(expression, values) for expression in concerned)

    multiples = (-(-multiple * sizes[name] // step) * step for multiple in _MULTIPLES)
    return min((size for size in multiples if size not in others), key=small, default=sizes[name])


def _tensor_sizes(text: str, symbols: Mapping[str, sympy.Symbol]) -> set[sympy.Expr]:
    """The expressions among the sizes of tensors that the text's calls return."""
    scanner = Scanner(text)
    found: set[sympy.Expr] = set()
    for call in _CALL.finditer(text):
        scanner.at, scanner.symbols = call.end(), dict(symbols)
        try:
            found |= _expressions(scanner.value_type(named=True))
        except ArtifactError:
            continue
    return {size for size in found if size.free_symbols <= {*symbols.values()}}


def _expressions(value: ValueType) -> set[sympy.Expr]:
    if isinstance(value, tuple):
        return set().union(*map(_expressions, value))
    return {size for size in value.shape if not isinstance(size, int)} if isinstance(value, TensorType) else set()


def _divisor(symbol: sympy.Symbol, sizes: Sequence[sympy.Expr]) -> int:
    """The least common multiple of the numbers that divide the symbol; 1 where it is too large for the size of a tensor."""
    divided = {part.args for size in sizes for part in size.atoms(FloorDiv, Mod)}
    found = math.lcm(*(int(by) for what, by in divided if symbol in what.free_symbols and isinstance(by, sympy.Integer)))
    return found if 0 < found <= _MOST_STEP else 1


def _is_small(size: sympy.Expr, values: Mapping[sympy.Symbol, int]) -> bool:
    try:
        return evaluate(size, values) < 2
    except InputError:
        return True
