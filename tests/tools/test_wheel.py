"""The wheel: built, installed in a fresh environment without a compiler, and run from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from lissom.errors import UnsupportedError
from lissom.ops.native import load_kernels
from lissom.ops.native.instruction_sets import SETS_OF_MACHINES, InstructionSet, usable_sets
from tools.wheel import PARTS, ROOT, build_wheel, needed_libc

MISSING = load_kernels()
LARGEST = 15_000_000
CROSS = "aarch64-linux-gnu-g++"
AARCH64 = 183
"""EM_AARCH64 in the header of an ELF file."""
DEMO = """
import json, time
started = time.perf_counter()
import torch, lissom
from lissom.cli.demo import SENTENCES
from lissom.frontends.models.huggingface import load
from lissom.ops.native import describe_kernels
minilm = load("minilm")
compiled = lissom.compile(minilm.model, minilm.example_inputs, progress=lambda *_: None)
found = compiled(**minilm.encode(SENTENCES)).last_hidden_state
kernels = sorted({str(node.target) for node in compiled.program.nodes() if str(node.target).startswith("lissom")})
print(json.dumps([lissom.__file__, describe_kernels(), kernels, found.flatten()[:50].tolist(), time.perf_counter() - started]))
"""


def demo(python: Path | str, folder: Path, **environment: str) -> list[object]:
    """What the demo's model says of its kernels and answers, in a process of its own."""
    given = {"HF_HUB_OFFLINE": "1", "LISSOM_KERNELS": "ours", "HOME": str(folder), **environment}
    done = subprocess.run([python, "-c", DEMO], cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fresh_environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel, which takes all other packages from this environment."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    # Before it sees the other packages, among them this environment's Lissom.
    subprocess.run([python, "-I", "-m", "pip", "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "packages.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=str(MISSING))
def test_wheel_runs_without_compiler_as_build_from_source_does(tmp_path):
    isa = usable_sets()[0]
    wheel = build_wheel(tmp_path, [isa])
    assert wheel.stat().st_size < LARGEST
    assert f"-py3-none-manylinux_2_{needed_libc(_libraries(wheel, tmp_path))}_" in wheel.name
    python = fresh_environment(tmp_path / "environment", wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    started = time.perf_counter()
    file, kernels, used, answers, _ = demo(python, elsewhere, PATH="/nowhere", CXX="no-compiler")
    print(f"first answer after {time.perf_counter() - started:.1f} s")
    assert Path(str(file)).is_relative_to(tmp_path / "environment")
    root = str(Path(__file__).parent.parent.parent)
    built = demo(sys.executable, elsewhere, PATH=os.environ["PATH"], PYTHONPATH=root, XDG_CACHE_HOME=_cache())
    assert [kernels, used, answers] == built[1:4]
    assert str(kernels).startswith(isa.name) and used


def _libraries(wheel: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(wheel) as archive:
        return [Path(archive.extract(name, folder / "unpacked")) for name in archive.namelist() if name.endswith(".so")]


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")


def test_an_sdist_holds_the_whole_package(tmp_path):
    staged = shutil.copytree(
        ROOT / "lissom", tmp_path / "lissom", ignore=shutil.ignore_patterns("__pycache__", "libraries")
    ).parent
    for name in PARTS[:-1]:
        shutil.copy(ROOT / name, staged)
    build = "import setuptools.build_meta as build; build.build_sdist('.')"
    subprocess.run([sys.executable, "-c", build], cwd=staged, check=True, capture_output=True)
    with tarfile.open(next(staged.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    package = {str(path.relative_to(staged)) for path in (staged / "lissom").rglob("*") if path.is_file()}
    assert "lissom/ops/native/module.cpp" in package and package <= held


@pytest.mark.parametrize(
    ("symbols", "minor"),
    [
        (b"GLIBC_2.5", 17),
        (b"GLIBC_2.29 GLIBCXX_3.4.22", 29),
        (b"GLIBC_2.29 GLIBC_2.17 GLIBCXX_3.4.29 GLIBCXX_3.4.9", 34),
        (b"GLIBCXX_3.4.32", 39),
        (b"GLIBCXX_3.4.99", 39),
    ],
)
def test_the_tag_names_the_first_system_with_both_libraries(tmp_path, symbols, minor):
    (tmp_path / "kernels.so").write_bytes(b"\x7fELF " + symbols + b"\0")
    assert needed_libc([tmp_path / "kernels.so"]) == minor


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"needs {CROSS} (Debian: apt-get install g++-aarch64-linux-gnu)")
def test_wheel_for_another_machine_is_built_by_cross_compiler(tmp_path, monkeypatch):
    # In place of PyTorch for AArch64: the linker asks for the library's name alone.
    subprocess.run([CROSS, "-shared", "-x", "c++", os.devnull, "-o", tmp_path / "libtorch_cpu.so"], check=True)
    monkeypatch.setenv("CXX", f"{CROSS} -L{tmp_path}")
    wheel = build_wheel(tmp_path / "dist", SETS_OF_MACHINES["aarch64"], "aarch64")
    assert wheel.name.endswith("_aarch64.whl")
    libraries = _libraries(wheel, tmp_path)
    assert {path.name.split("-")[1] for path in libraries} == {"armv8", "armv8_2"}
    for path in libraries:
        header = path.read_bytes()[:20]
        assert header[:4] == b"\x7fELF" and int.from_bytes(header[18:20], "little") == AARCH64


def test_a_library_for_one_processor_is_no_wheel(tmp_path):
    with pytest.raises(
        UnsupportedError, match="would run on processors like this one only; there are wheels for x86_64, aarch64"
    ):
        build_wheel(tmp_path, [InstructionSet("native", (), ("-march=native",))])


def test_libraries_with_flags_of_ones_own_are_no_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_CXXFLAGS", "-O1")
    with pytest.raises(UnsupportedError, match="LISSOM_CXXFLAGS is set"):
        build_wheel(tmp_path)
