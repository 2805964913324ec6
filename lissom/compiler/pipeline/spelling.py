"""Pipelines as text and back: `prune-heads{keep=0.75,criterion=taylor},quantize{scheme=int8-dynamic}`."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from lissom.compiler.pipeline.pass_kinds import Pass
from lissom.errors import PipelineTextError, nearest

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_OPTION = re.compile(r"[a-z_][a-z0-9_]*")
_BARE = re.compile(r"[A-Za-z0-9_.*+/:\-]+")
_LOOKS_TYPED = re.compile(r"none|true|false|[-+]?(inf|nan|[0-9.][^:]*)")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The passes as text; `parse_pipeline` is the inverse."""
    return ",".join(format_pass(pass_) for pass_ in passes)


def format_pass(pass_: Pass) -> str:
    """One pass as text; options at their default are left out."""
    options = []
    for field in dataclasses.fields(pass_):
        value = getattr(pass_, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            options.append(f"{field.name}={format_value(value)}")
    return pass_.name() + ("{" + ",".join(options) + "}" if options else "")


def format_value(value: object) -> str:
    """The value of an option as pipeline text."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case str():
            plain = _BARE.fullmatch(value) is not None and _LOOKS_TYPED.fullmatch(value) is None
            return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        case tuple():
            return "[" + ",".join(format_value(part) for part in value) + "]"
        case _ if callable(value):
            return str(getattr(value, "__name__", type(value).__name__))
        case _:
            raise TypeError(f"an option is a number, a flag, a word or a tuple of these, not {value!r}")


def parse_pipeline(text: str, table: Mapping[str, type[Pass]], recipes: Mapping[str, str] | None = None) -> list[Pass]:
    """The passes of a pipeline text, looked up by name in a table; a recipe's name stands for the recipe's passes.

    Raises:
        PipelineTextError: with the place in the text, what was found and what is allowed.
    """
    return _Parser(text, table, recipes or {}).pipeline()


class _Parser:
    """A recursive-descent parser over one text; `at` is the index of the current character."""

    def __init__(self, text: str, table: Mapping[str, type[Pass]], recipes: Mapping[str, str]) -> None:
        self.text = text
        self.table = table
        self.recipes = recipes
        self.at = 0

    def pipeline(self) -> list[Pass]:
        passes: list[Pass] = []
        self._space()
        while self.at < len(self.text):
            passes += self._item()
            self._space()
            if self.at < len(self.text):
                self._expect(",", "',' before the next pass")
                self._space()
                if self.at == len(self.text):
                    self._fail("expected the name of a pass after ','")
        return passes

    def _item(self) -> list[Pass]:
        start = self.at
        name = self._take(_NAME, "the name of a pass")
        if name in self.recipes:
            return _Parser(self.recipes[name], self.table, {}).pipeline()
        return [self._pass(name, start)]

    def _pass(self, name: str, start: int) -> Pass:
        if name not in self.table:
            hint = nearest(name, [*self.table, *self.recipes]) or ";"
            self._fail(f"there is no pass '{name}'{hint} `lissom passes` lists them all", start)
        cls = self.table[name]
        options: dict[str, object] = {}
        if self._accept("{"):
            self._space()
            while not self._accept("}"):
                key, value = self._option(cls, options)
                options[key] = value
                self._space()
                if not self._peek("}"):
                    self._expect(",", f"',' or '}}' after the value of '{key}'")
                    self._space()
        try:
            return cls(**options)
        except (TypeError, ValueError) as error:
            missing = re.findall(r"'(\w+)'", str(error)) if isinstance(error, TypeError) else []
            reason = f"needs {', '.join(missing)}" if missing else str(error)
            self._fail(f"{name}: {reason}", start, cause=error)

    def _option(self, cls: type[Pass], seen: Mapping[str, object]) -> tuple[str, object]:
        start = self.at
        key = self._take(_OPTION, f"an option of {cls.name()}")
        hints = options_of(cls)
        if key not in hints:
            listed = ", ".join(hints) or "none"
            self._fail(f"{cls.name()} has no option '{key}'{nearest(key, hints) or ';'} its options: {listed}", start)
        if key in seen:
            self._fail(f"{cls.name()} is given '{key}' twice", start)
        self._space()
        self._expect("=", f"'=' after '{key}'")
        self._space()
        start = self.at
        value = self._value()
        typed, fits = _coerce(value, hints[key])
        if not fits:
            self._fail(f"option '{key}' of {cls.name()} takes {type_text(hints[key])}, not {value!r}", start)
        return key, typed

    def _value(self) -> object:
        if self._accept("["):
            parts: list[object] = []
            self._space()
            while not self._accept("]"):
                parts.append(self._value())
                self._space()
                if not self._peek("]"):
                    self._expect(",", "',' or ']' in the list")
                    self._space()
            return tuple(parts)
        quoted = _QUOTED.match(self.text, self.at)
        if quoted:
            self.at = quoted.end()
            return _Quoted(re.sub(r"\\(.)", r"\1", quoted.group(1)))
        return self._take(_BARE, "a value")

    def _space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _peek(self, character: str) -> bool:
        return self.text.startswith(character, self.at)

    def _accept(self, character: str) -> bool:
        accepted = self._peek(character)
        self.at += accepted
        return accepted

    def _expect(self, character: str, what: str) -> None:
        if not self._accept(character):
            self._fail(f"expected {what}, found {self._found()}")

    def _take(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.at)
        if match is None:
            self._fail(f"expected {what}, found {self._found()}")
        self.at = match.end()
        return match.group()

    def _found(self) -> str:
        return f"'{self.text[self.at]}'" if self.at < len(self.text) else "the end of the text"

    def _fail(self, message: str, at: int | None = None, cause: Exception | None = None) -> NoReturn:
        at = self.at if at is None else at
        line = self.text.replace("\n", " ")
        raise PipelineTextError(f"pipeline text, character {at + 1}: {message}\n  {line}\n  {' ' * at}^") from cause


class _Quoted(str):
    """A quoted text, which stays text even when it looks like a number."""


def options_of(cls: type[Pass]) -> dict[str, object]:
    """The options of a pass: each field's name and type."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_text(hint: object) -> str:
    """The type of an option as text: `a number`, `true or false`, `one of l1, l2`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else type_text(part) for part in arguments)
    if origin is tuple:
        return f"a list [a,b] of which each is {type_text(arguments[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    return names.get(hint, str(hint)) if isinstance(hint, type) else str(hint)


def _coerce(value: object, hint: object) -> tuple[object, bool]:
    """The parsed value as the option's type, and whether it fits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for part in sorted(arguments, key=lambda part: (part is str, part is not type(None))):
            typed, fits = _coerce(value, part)
            if fits:
                return typed, True
        return None, False
    if origin is tuple:
        if not isinstance(value, tuple):
            return None, False
        parts = [_coerce(part, arguments[0]) for part in value]
        return tuple(typed for typed, _ in parts), all(fits for _, fits in parts)
    if not isinstance(value, str):
        return None, False
    if origin is Literal:
        matching = [choice for choice in arguments if str(choice) == value]
        return (matching[0], True) if matching else (None, False)
    if hint is str:
        return str(value), True
    return (None, False) if isinstance(value, _Quoted) else _scalar(value, hint)


def _scalar(word: str, hint: object) -> tuple[object, bool]:
    if hint is type(None):
        return None, word == "none"
    if hint is bool:
        return word == "true", word in ("true", "false")
    if not (hint is int or hint is float):
        return None, False
    try:
        return (int(word) if hint is int else float(word)), True
    except ValueError:
        return None, False
