"""Markdown with executable code: finds the fenced blocks of a document, runs them in order, and fills in their output.

A document's Python blocks share one namespace. A text block after the comment `<!-- output -->` holds the output of the Python
block before it. `<!-- output, measured -->` marks measured output; comparisons ignore the decimals of such a block.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import sys
import tempfile
import types
from collections.abc import Generator
from dataclasses import dataclass

_FENCE = "```"
_OUTPUT = re.compile(r"<!-- output(, measured)? -->")
_DECIMAL = re.compile(r"[-+]?\d+(\.\d+)?e[-+]?\d+|[-+]?\d+\.\d+")
_SLOW_BUILD = re.compile(r"^\w+ built the program in .* s\n", re.MULTILINE)
_GAIN = re.compile(r"(^\S+: on \w+)\s[\d.]+\sx\sthe\stime\s\(.*?\),\s[\d.]+\sMB\sagainst\s[\d.]+$", re.MULTILINE | re.DOTALL)
_SOURCE_LINE = re.compile(r"(\w+\.py):\d+")


@dataclass(frozen=True)
class Block:
    """A fenced block, whose body is the document's lines from `first` up to, not including, `last`.

    info: the text after the opening fence, `python`. mark: the line above it.
    """

    info: str
    mark: str
    first: int
    last: int


def find_blocks(lines: list[str]) -> list[Block]:
    """The document's fenced blocks in order.

    Raises: ValueError if a fence is not closed.
    """
    fences = [index for index, line in enumerate(lines) if line.startswith(_FENCE)]
    if len(fences) % 2:
        raise ValueError(f"the block opened on line {fences[-1] + 1} is not closed")
    return [
        Block(lines[opened].removeprefix(_FENCE).strip(), lines[opened - 1].strip() if opened else "", opened + 1, closed)
        for opened, closed in zip(fences[::2], fences[1::2], strict=True)
    ]


def fill(text: str, name: str) -> str:
    """The document after its code was run, with every output block filled in.

    name: the document's name; its code counts as the file `<name>.py` in tracebacks and in programs.
    """
    lines = text.split("\n")
    filled: list[str] = []
    copied, printed = 0, ""
    with _session(name) as session:
        for block in find_blocks(lines):
            if block.info == "python":
                printed = session.run("\n".join(lines[block.first : block.last]), block.first + 1)
            elif _OUTPUT.fullmatch(block.mark):
                filled += [*lines[copied : block.first], *(line.rstrip() for line in printed.strip("\n").split("\n"))]
                copied = block.last
    return "\n".join([*filled, *lines[copied:]])


@dataclass
class _Session:
    """Runs the code of one document, block after block; `source` is the code run so far."""

    module: types.ModuleType
    source: str = ""

    def run(self, code: str, line: int) -> str:
        """The output of a block. Line numbers continue from the blocks before it, so that output text does not shift them."""
        name = f"{self.module.__name__}.py"
        before = self.source.count("\n")
        self.source += code + "\n"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * before + code, name, "exec"), self.module.__dict__)
        except Exception as error:
            error.add_note(f"in the block that begins on line {line} of the document {self.module.__name__}")
            raise
        return printed.getvalue()


@contextlib.contextmanager
def _session(name: str) -> Generator[_Session]:
    """A module for a document's code, run in an empty directory."""
    module = types.ModuleType(name)
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        sys.modules[name] = module
        try:
            yield _Session(module)
        finally:
            del sys.modules[name]


def settled(text: str, outputs: bool = True) -> str:
    """The document without the parts that differ between runs or machines.

    outputs: whether to keep the output blocks at all.
    """
    lines = text.split("\n")
    for block in reversed(find_blocks(lines)):
        mark = _OUTPUT.fullmatch(block.mark)
        if mark is None:
            continue
        body = _SOURCE_LINE.sub(r"\1", "\n".join(lines[block.first : block.last])) if outputs else ""
        lines[block.first : block.last] = [mask(body) if mark.group(1) else body]
    return "\n".join(lines)


def mask(text: str) -> str:
    """The text without its decimals, the spaces and rules that align them, and notes on slow builds and on times of passes."""
    text = _GAIN.sub(r"\1", _SLOW_BUILD.sub("", text))
    return re.sub(r"─+", "─", re.sub(r" +", " ", _DECIMAL.sub("#", text)))
