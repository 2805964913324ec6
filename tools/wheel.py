"""Builds the wheel of this platform with its kernels: `python -m tools.wheel dist`.

It needs a C++ compiler, and PyTorch and setuptools in the environment that runs it. The libraries of all instruction sets
are built, or taken from the cache, and put into a copy of the package. The wheel serves every Python, and every PyTorch from
2.11 on; its tag says which C library it needs at least. `--isa avx2` builds that set alone, for a try.

`--machine aarch64` builds on another kind of machine, with a cross compiler and PyTorch's library for that machine:
`CXX="aarch64-linux-gnu-g++ -L/folder/of/its/torch/lib"`.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from lissom.errors import UnsupportedError
from lissom.ops.native.build import FLAGS, build_once, built_library, find_compiler, shipped_name
from lissom.ops.native.instruction_sets import INSTRUCTION_SETS, SETS_OF_MACHINES, InstructionSet

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "README.md", "LICENSE", "lissom")
OLDEST_LIBC = 17
"""manylinux_2_17 is the oldest tag that pip knows by this name."""
CXX_OF_LIBC = {19: 17, 22: 24, 24: 27, 28: 31, 29: 34, 30: 35, 33: 39}
"""GLIBCXX_3.4.x of the C++ library, and the first manylinux_2_x that has it. Source: auditwheel's manylinux-policy.json."""


def build_wheel(output: Path, sets: Sequence[InstructionSet] = INSTRUCTION_SETS, machine: str = platform.machine()) -> Path:
    """Build the wheel for a kind of machine into a folder, and return its path.

    Raises: UnsupportedError where kernels are built for one kind of processor only, or with flags of one's own; RuntimeError
        without a compiler or when it fails; CalledProcessError when pip fails.
    """
    if os.environ.get(FLAGS):
        raise UnsupportedError(f"{FLAGS} is set, and an installed package takes no libraries of other flags; unset it")
    if any("-march=native" in isa.flags for isa in sets):
        known = ", ".join(SETS_OF_MACHINES)
        raise UnsupportedError(
            f"a wheel for {machine} would run on processors like this one only; there are wheels for {known}"
        )
    compiler = find_compiler()
    strip = subprocess.run([*compiler, "-print-prog-name=strip"], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder)
        for name in PARTS:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
            copy(ROOT / name, staged / name)
        libraries = staged / "lissom" / "ops" / "native" / "libraries"
        libraries.mkdir()
        for isa in sets:
            build_once(compiler, built_library(isa), isa)
            subprocess.run([strip, "-o", libraries / shipped_name(isa), built_library(isa)], check=True)
        tag = f"manylinux_2_{needed_libc(libraries.iterdir())}_{machine}"
        options = [f"--config-settings=--build-option=--plat-name={tag}", "--no-deps", "--no-build-isolation", "--quiet"]
        subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", output, staged], check=True)
    return next(output.glob(f"lissom-*{tag}.whl"))


def needed_libc(libraries: Iterable[Path]) -> int:
    """The minor version of glibc 2 whose manylinux tag has the C and the C++ library that the libraries need: 34 for 2.34."""
    needed = OLDEST_LIBC
    for path in libraries:
        library = path.read_bytes()
        libc = (int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library))
        newest = max((int(minor) for minor in re.findall(rb"GLIBCXX_3\.4\.(\d+)", library)), default=0)
        cxx = next((tag for known, tag in CXX_OF_LIBC.items() if known >= newest), max(CXX_OF_LIBC.values()))
        needed = max(needed, cxx, *libc)
    return needed


def main() -> None:
    """Build, and print the wheel with its size."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="the folder of the wheel")
    parser.add_argument("--machine", choices=[*SETS_OF_MACHINES], default=platform.machine(), help="this machine's by default")
    parser.add_argument("--isa", action="append", metavar="NAME", help="an instruction set; all by default")
    given = parser.parse_args()
    sets = SETS_OF_MACHINES.get(given.machine, INSTRUCTION_SETS)
    unknown = set(given.isa or ()) - {isa.name for isa in sets}
    if unknown:
        parser.error(f"--isa {min(unknown)} is none of {given.machine}: {', '.join(isa.name for isa in sets)}")
    wheel = build_wheel(given.output, [isa for isa in sets if not given.isa or isa.name in given.isa], given.machine)
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
