"""The errors Lissom raises on purpose.

A message says where (node, module path, source line, pass), what was found, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class LissomError(Exception):
    """The base class of all errors; `history` is the `History` of the pipeline that failed, or None.

    Examples:
        >>> import torch, lissom
        >>> try:
        ...     lissom.compile(torch.nn.Linear(4, 2), torch.randn(3, 4), passes="prune-head")
        ... except lissom.LissomError as error:
        ...     print(str(error).splitlines()[0])
        pipeline text, character 1: there is no pass 'prune-head'; did you mean 'prune-heads'? `lissom passes` lists them all
    """

    history: Any = None


class CaptureError(LissomError):
    """The model could not be captured as a program."""


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
    """The requested backend, device, operator or model is not supported here."""


class ArtifactError(LissomError):
    """A file or directory cannot be read or written, or does not hold what was expected."""


class RankError(LissomError):
    """A rank of the process group ended, does not answer, or runs another program."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or an empty text."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
