"""Short descriptions of errors in a model's own code: its line and its message."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from lissom.frontends.capture.flatten import FRAME

TORCH_FOLDER = str(Path(torch.__file__).parent)


def describe_failure(error: Exception) -> str:
    """The model's line, the error's type and the first line of its text."""
    return f"{model_line(error)}: {type(error).__name__}: {first_line(error)}"


def model_line(error: Exception) -> str:
    """The innermost traceback line outside torch, `modeling.py:12 (if x.sum() > 0:)`; `torch` if there is none.

    The error of a graph module names the source line of the failing node itself.
    """
    recorded = FRAME.findall(str(error).partition("Original traceback:")[2])
    recorded = [frame for frame in recorded if not frame[0].startswith(TORCH_FOLDER)]
    if recorded:
        file, line, code = recorded[-1]
        return line_text(file, line, code)
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TORCH_FOLDER, "<"))
    ]
    frames = [frame for frame in frames if Path(__file__).parent.parent not in Path(frame.filename).parents]
    if not frames:
        return "torch"
    return line_text(frames[-1].filename, frames[-1].lineno, frames[-1].line)


def line_text(file: str, number: object, code: str | None) -> str:
    """A line of code with its place, `modeling.py:12 (`if x.sum() > 0:`)`."""
    return f"{Path(file).name}:{number} (`{(code or '').strip()}`)"


def first_line(error: Exception) -> str:
    """The first nonempty line of an error's text; its type if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
