"""Gives the reference the whole signatures of functions whose keywords are the fields of a dataclass."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import griffe

from lissom.driver.keywords import keywords_of


class KeywordSignatures(griffe.Extension):
    """A griffe extension that reads the signature of a function under `keywords_of` from the function itself."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the parameters of one function."""
        if isinstance(obj, griffe.Function) and any(
            str(item.value).startswith(f"{keywords_of.__name__}(") for item in obj.decorators
        ):
            whole = inspect.signature(getattr(import_module(obj.module.path), obj.name))
            obj.parameters = griffe.Parameters(*map(_parameter, whole.parameters.values()))


def _parameter(given: inspect.Parameter) -> griffe.Parameter:
    default = None if given.default is given.empty else repr(given.default)
    kind = griffe.ParameterKind[given.kind.name.lower()]
    return griffe.Parameter(given.name, annotation=given.annotation, kind=kind, default=default)
