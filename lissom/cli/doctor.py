"""The command `lissom doctor`: what is installed, what runs here, and the line that installs what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import typer
from rich.text import Text

from lissom.backends import BACKENDS
from lissom.errors import LissomError
from lissom.inspect.tables import plain_table, show
from lissom.ops.native import describe_kernels, load_kernels
from lissom.ops.native.build import find_compiler
from lissom.ops.native.instruction_sets import processors, usable_sets
from lissom.version import __version__

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<extras>[\w,-]+)\])?(?P<versions>[^;]*)(?:;.*extra == ['\"](?P<extra>[\w-]+))?"
)
_TOOLS = ("dev", "docs", "zoo")
"""Extras for work on Lissom itself."""
_CUDA = "onnx-gpu"
"""The extra for CUDA devices, which excludes `onnx`."""


@dataclass(frozen=True)
class Requirement:
    """A package that Lissom, or one of its extras, needs.

    Attributes:
        least: the lowest version.
        extra: the extra that needs it; empty where Lissom itself does.
        includes: the extras of Lissom that this one includes, where the package is Lissom.
    """

    name: str
    least: str
    extra: str
    includes: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        """`scipy`, or `scipy 1.9, which must be 1.11 or newer`; None when it is installed in such a version."""
        try:
            version = importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return self.name
        if _release(version) >= _release(self.least):
            return None
        return f"{self.name} {version}, which must be {self.least} or newer"


def parse_requirement(text: str) -> Requirement:
    """A requirement as the metadata of a package spells it: `scipy>=1.11; extra == "tune"`."""
    match = _REQUIREMENT.match(text)
    assert match, text
    least = re.search(r">=\s*([\w.]+)", match["versions"])
    includes = tuple((match["extras"] or "").split(",")) if match["name"] == "lissom" else ()
    return Requirement(match["name"], least[1] if least else "0", match["extra"] or "", includes)


def faults_by_extra(requirements: Sequence[Requirement]) -> dict[str, list[str]]:
    """The packages of every extra that are missing or too old; those of Lissom itself under an empty name."""
    names = dict.fromkeys(("", *(requirement.extra for requirement in requirements)))
    return {
        name: sorted({requirement.fault for requirement in _of_extra(name, requirements) if requirement.fault})
        for name in names
    }


def _of_extra(name: str, requirements: Sequence[Requirement]) -> Iterator[Requirement]:
    for requirement in requirements:
        if requirement.extra != name:
            continue
        if requirement.name != "lissom":
            yield requirement
        for included in requirement.includes:
            yield from _of_extra(included, requirements)


def run_doctor() -> None:
    """Say what is installed, what runs here, and which line installs the rest; exit 1 when something needed is broken."""
    try:
        requirements = [parse_requirement(text) for text in importlib.metadata.requires("lissom") or ()]
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    faults = faults_by_extra(requirements)
    broken = [f"Lissom needs {fault}: pip install -U lissom" for fault in faults.pop("", [])]
    try:
        kernels, missing = describe_kernels(), load_kernels()
        sets = ", ".join(isa.name for isa in usable_sets())
    except LissomError as error:  # the environment asks for an instruction set that is not there
        kernels = sets = str(error)
        broken, missing = [*broken, str(error)], None
    table = plain_table()
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    rows = [*_versions(), ("processor", _processor()), ("instruction sets", sets), ("kernels", kernels)]
    rows += [("C++ compiler", _compiler(needed=bool(missing))), *_backends()]
    skipped = {*_TOOLS, "onnx" if torch.cuda.is_available() else _CUDA, "all"}
    rows += [(f"extra {name}", _extra(name, faulty)) for name, faulty in sorted(faults.items()) if name not in skipped]
    if not requirements:
        rows.append(("extras", "not known, as Lissom runs from files and is not installed"))
    for what, finding in rows:
        table.add_row(what, Text(finding))
    show(table, *broken, *([] if broken else ["everything that Lissom needs is there"]))
    if broken:
        raise typer.Exit(1)


def _versions() -> Iterator[tuple[str, str]]:
    yield "lissom", __version__
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, {', '.join(devices) or 'no CUDA device'}"


def _processor() -> str:
    first = next(iter(processors()), {})
    return first.get("model name") or platform.processor() or platform.machine()


def _compiler(*, needed: bool) -> str:
    try:
        return " ".join(find_compiler())
    except RuntimeError as error:
        return str(error) if needed else "none, and none is needed: the kernels are there"


def _backends() -> Iterator[tuple[str, str]]:
    for name, backend in BACKENDS.items():
        yield f"backend {name}", backend().missing() or "ready"


def _extra(name: str, faults: Sequence[str]) -> str:
    return f"lacks {', '.join(faults)}: pip install 'lissom[{name}]'" if faults else "installed"


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) of `2.13.0+cpu`."""
    digits = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in digits[0].split(".")) if digits else ()
