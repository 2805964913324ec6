"""Reading the text of declared dimensions (`lissom.ops.dimensions`) into forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from lissom.ops.dimensions import Dimensions

_TOKEN = re.compile(r"\s*(\.\.\.|[!+()\[\]]|[a-z][a-z_]*\*?|\d+)")


@dataclass(frozen=True)
class Compound:
    """A dimension made of several: a product, whose last part runs fastest, or parts that follow each other."""

    parts: tuple[str, ...]
    product: bool = True


Dim = str | Compound
"""The name of a dimension, of sizes that stand in the declaration, or of a compound; empty where a size of 1 is broadcast."""


@dataclass(frozen=True)
class Pattern:
    """A tensor of a form.

    Attributes:
        dims: with `...` and starred names.
        mark: `+`, `~` or none.
        optional: the last may be missing.
        opaque: `_`, a layout of its own.
    """

    dims: tuple[Dim, ...]
    mark: str = ""
    optional: bool = False
    opaque: bool = False


@dataclass(frozen=True)
class Form:
    """One form of a declaration.

    Attributes:
        work: a sum of products of sizes.
        fixed: names with `!`.
        condition: a flag and its value.
    """

    operands: tuple[Pattern, ...]
    results: tuple[Pattern, ...]
    work: tuple[tuple[Dim, ...], ...]
    fixed: frozenset[str]
    condition: tuple[str, bool] | None


@cache
def forms_of(text: str) -> tuple[Form, ...]:
    """The forms of a declaration, in order. Raises ValueError where the text is none."""
    return tuple(_form(part) for part in text.split("|"))


def _form(text: str) -> Form:
    body, _, condition = text.partition(" if ")
    words = condition.split()
    shapes, _, work = body.partition(":")
    left, arrow, right = shapes.partition("->")
    if not arrow or len(words) > 2:
        raise ValueError(f"no form of dimensions: {text!r}")
    fixed: set[str] = set()
    operands = tuple(_operand(part, fixed) for part in left.split(","))
    results = tuple(_operand(part, fixed) for part in right.split(","))
    terms = tuple(_operand(part, fixed).dims for part in work.split(" + ")) if work else ()
    return Form(operands, results, terms, frozenset(fixed), (words[-1], len(words) == 1) if words else None)


def _operand(text: str, fixed: set[str]) -> Pattern:
    text = text.strip()
    if text == "_":
        return Pattern((), opaque=True)
    mark = text[0] if text[:1] in ("+", "~") else ""
    tokens = _tokens(text.removeprefix(mark))
    dims: list[Dim] = []
    optional = False
    while tokens:
        token = tokens.pop(0)
        if token == "!":
            fixed.add(tokens[0])
        elif token == "[":
            optional = True
        elif token == "(":
            end = tokens.index(")")
            inside, tokens = tokens[:end], tokens[end + 1 :]
            dims.append(Compound(tuple(part for part in inside if part != "+"), product="+" not in inside))
        elif token != "]":
            dims.append(token)
    return Pattern(tuple(dims), mark, optional)


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text!r} does not name dimensions from {text[at:]!r} on")
        tokens.append(match[1])
        at = match.end()
    return tokens


@cache
def of_equation(equation: str) -> Dimensions | None:
    """The declaration of an einsum; None where a letter stands twice in a term, or the result is implied."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = [*left.split(","), right]
    if not arrow or any(len(set(letters)) != len(letters) for letters in (term.replace(".", "") for term in terms)):
        return None
    if any("..." in term and not term.startswith("...") for term in terms):
        return None
    # Names of dimensions are lower-case: a capital letter is written twice.
    spelled = [" ".join(["..."] * ("..." in term) + [_letter(letter) for letter in term.replace(".", "")]) for term in terms]
    return Dimensions(f"{', '.join(spelled[:-1])} -> {spelled[-1]}", factors=("tensors",))


def _letter(letter: str) -> str:
    return letter if letter.islower() else f"{letter.lower()}_{letter.lower()}"
