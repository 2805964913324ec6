"""Every error Lissom raises on purpose.

A message says where (node, module path, source line, pass), what was found, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

_Made = TypeVar("_Made", bound=Callable[..., Any])

RENAMED = (
    ("ways", "world_size"),
    ("cut", "partition"),
    ("eliminate-dead-heads", "eliminate-dead"),
    ("eliminate-dead-neurons", "eliminate-dead"),
    ("eliminate-dead-layers", "eliminate-dead"),
    ("eliminate-dead-hidden", "eliminate-dead"),
)
"""Names of options and passes as they once were, each with the name it has now."""


class LissomError(Exception):
    """The one family; `history` is the `History` of the pipeline that stopped, where there was one."""

    history: Any = None


class CaptureError(LissomError):
    """The model could not be brought into a program."""


class InputError(LissomError, ValueError):
    """A call's arguments do not fit the program's signature."""


class PipelineTextError(LissomError):
    """The text of a pipeline is malformed, or names a pass or option that does not exist."""


class RequirementError(LissomError):
    """A pass needs a fact about the program that does not hold."""


class VerifyError(LissomError):
    """A program is structurally wrong, or an exact pass changed its outputs."""


class PassError(LissomError):
    """A pass raised while it ran; the program from before the pass is intact."""


class BudgetError(LissomError):
    """An approximation cost more quality than the caller allowed."""


class UnsupportedError(LissomError):
    """What was asked for does not exist here: a backend, a device, an operator, a model."""


class ArtifactError(LissomError):
    """A file or directory given to Lissom cannot be read or written as what it should be."""


class RankError(LissomError):
    """A rank that runs a program with others ended, does not answer, or runs something else."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing when none is near; for an old name the new one."""
    known = list(known)
    renamed = next((new for old, new in RENAMED if old == word and new in known), None)
    if renamed is not None:
        return f"; it is called '{renamed}' now;"
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def refuse_old_names(made: _Made) -> _Made:
    """Let a function or a class answer a keyword that was renamed with a sentence that has the new name.

    The result raises TypeError, as Python does for any other keyword that does not exist.
    """
    if inspect.isclass(made):
        made.__init__ = refuse_old_names(made.__init__)
        return made  # pyright: ignore[reportReturnType]
    parameters = inspect.signature(made).parameters
    renamed = {old: new for old, new in RENAMED if new in parameters}

    @wraps(made)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for old in renamed.keys() & kwargs.keys():
            raise TypeError(f"{made.__qualname__.removesuffix('.__init__')}() has no {old}=; it is called {renamed[old]}= now")
        return made(*args, **kwargs)

    return checked  # pyright: ignore[reportReturnType]
