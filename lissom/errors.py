"""Every error Lissom raises on purpose.

A message says where (node, module path, source line, pass), what was found, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


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
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing when none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
