"""Functions whose keywords are the fields of a dataclass, where each has its name, type and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from torch import nn

from lissom.compiler.ir.program import Program
from lissom.driver.options import Inputs
from lissom.runtime.compiled_model import CompiledModel

_Fields = ParamSpec("_Fields")
_Options = TypeVar("_Options", covariant=True)
_Result = TypeVar("_Result", covariant=True)


class TextModel(Protocol):
    """The type of the models of Sentence Transformers."""

    model_card_data: Any

    def preprocess(self, inputs: Any, /) -> Any: ...


_TextModel = TypeVar("_TextModel", bound=TextModel)


class Compile(Protocol[_Fields]):
    """The type of `lissom.compile`."""

    @overload
    def __call__(
        self, model: _TextModel, example_inputs: Inputs | None = None, *args: _Fields.args, **options: _Fields.kwargs
    ) -> _TextModel: ...

    @overload
    def __call__(
        self, model: nn.Module | Program, example_inputs: Inputs, *args: _Fields.args, **options: _Fields.kwargs
    ) -> CompiledModel: ...

    @overload
    def __call__(
        self, model: str | Path, example_inputs: Inputs | None = None, *args: _Fields.args, **options: _Fields.kwargs
    ) -> CompiledModel: ...


class OnInputs(Protocol[_Fields, _Result]):
    """The type of a function of a model, example inputs, and keywords."""

    def __call__(
        self, model: nn.Module | Program, example_inputs: Inputs, *args: _Fields.args, **options: _Fields.kwargs
    ) -> _Result: ...


class OnModel(Protocol[_Fields, _Result]):
    """The type of a function of a model and keywords."""

    def __call__(self, model: nn.Module, *args: _Fields.args, **options: _Fields.kwargs) -> _Result: ...


class OnCheckpoint(Protocol[_Fields, _Result]):
    """The type of a function of a model, or the folder of a checkpoint, and keywords."""

    def __call__(self, model: nn.Module | str | Path, *args: _Fields.args, **options: _Fields.kwargs) -> _Result: ...


class _Decorator(Protocol[_Fields, _Options]):
    @overload
    def __call__(
        self, function: Callable[[nn.Module | Program | str | Path, Inputs | None, _Options], CompiledModel | TextModel], /
    ) -> Compile[_Fields]: ...

    @overload
    def __call__(
        self, function: Callable[[nn.Module | Program, Inputs, _Options], _Result], /
    ) -> OnInputs[_Fields, _Result]: ...

    @overload
    def __call__(
        self, function: Callable[[nn.Module | str | Path, _Options], _Result], /
    ) -> OnCheckpoint[_Fields, _Result]: ...

    @overload
    def __call__(self, function: Callable[[nn.Module, _Options], _Result], /) -> OnModel[_Fields, _Result]: ...


def keywords_of(options: Callable[_Fields, _Options]) -> _Decorator[_Fields, _Options]:
    """A decorator: the function takes the fields of a dataclass as keywords, in place of its last argument, the dataclass.

    `inspect.signature`, `help` and type checkers show all keywords with their types and defaults.
    """
    make: Callable[..., _Options] = options
    fields = inspect.signature(options).parameters

    def decorate(function: Callable[..., Any]) -> Any:
        plain = inspect.signature(function)
        required_first = sorted(fields.values(), key=lambda field: field.default is not field.empty)
        signature = plain.replace(parameters=[*list(plain.parameters.values())[:-1], *required_first])

        @wraps(function)
        def run(*args: object, **named: object) -> object:
            try:
                given = signature.bind(*args, **named).arguments
            except TypeError as error:
                raise TypeError(f"{function.__name__}() {error}") from None
            chosen = {name: given.pop(name) for name in fields if name in given}
            return function(**given, settings=make(**chosen))

        vars(run)["__signature__"] = signature
        return run

    return decorate
