"""Builds the library of C++ kernels for this processor, once, and caches it where only this user may write.

The build is one compiler command rather than `torch.utils.cpp_extension.load`: it needs no `ninja`, and an interrupted build
blocks no other. The library is written under a temporary name and renamed. Other processes wait for a file lock, which the
system releases when its process ends. The file name is a hash of the sources, the flags, PyTorch's version, the compiler and
the processor's features.

A record next to the library holds its hash, which is checked before loading, and the result of its self-test. The self-test
is a process that compares every kernel with its reference, since a loaded library cannot be unloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

FLAGS = "LISSOM_CXXFLAGS"
"""Set this environment variable to compiler flags that follow Lissom's own, such as `-march=haswell`."""

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-w")
_SELF_TEST_SECONDS = 600


def kept_library() -> Path:
    """The library for this processor, built if it is not cached or was damaged.

    Raises: RuntimeError or OSError with the reason why there is none.
    """
    compiler = find_compiler()
    library = cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
    found = self_test_of(library)
    if found is None:
        build_once(compiler, library)
        found = self_test_of(library)
    if found:
        raise RuntimeError(f"the C++ kernels failed their self-test: {found}; delete {_record(library)} to build them again")
    return library


def find_compiler() -> list[str]:
    """The command that compiles C++: CXX where it is set. Raises: RuntimeError when there is no such program."""
    given = shlex.split(os.environ.get("CXX", ""))
    if given and shutil.which(given[0]) is None:
        raise RuntimeError(f"CXX names the compiler '{given[0]}', and there is no such program")
    if given:
        return given
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        raise RuntimeError("there is no C++ compiler; install g++ (Debian: apt-get install g++) for Lissom's kernels")
    return [found]


def cache_folder() -> Path:
    """The folder of the library, which only this user may write to; created if it does not exist.

    Where the user's cache cannot be used, a folder for temporary files, with a warning.

    Raises: OSError when that cannot be used either.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return _private((given if given.is_absolute() else Path.home() / ".cache") / "lissom")
    except (OSError, RuntimeError) as error:
        found = _private(Path(tempfile.gettempdir()) / f"lissom-{os.getuid()}")
        warnings.warn(f"Lissom keeps its C++ kernels in {found} because its cache cannot be used: {error}", stacklevel=2)
        return found


def _private(folder: Path) -> Path:
    """The folder, created if it does not exist. Raises: OSError when others can write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if not found.st_uid == folder.lstat().st_uid == os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if found.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by other users (chmod go-w it, or set XDG_CACHE_HOME)")
    return folder


def self_test_of(library: Path) -> str | None:
    """The recorded result of a library's self-test, empty when it passed; None for a missing or changed library."""
    try:
        record = json.loads(_record(library).read_text(encoding="utf-8"))
        if record["sha256"] != hashlib.sha256(library.read_bytes()).hexdigest():
            return None
        return str(record["self_test"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_once(compiler: list[str], library: Path) -> None:
    """Build the library, or wait for the process that is building it. Raises: as `_build` does."""
    import fcntl  # exists on Unix only

    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if self_test_of(library) is None:
            _build(compiler, library)


def _record(library: Path) -> Path:
    return library.with_suffix(".json")


def _sources() -> list[Path]:
    return sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")])


def _flags() -> list[str]:
    return [*_FLAGS, *shlex.split(os.environ.get(FLAGS, ""))]


def _fingerprint(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [torch.__version__, version, _processor(), *_flags(), *(path.read_text(encoding="utf-8") for path in _sources())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """The processor's features, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build(compiler: list[str], library: Path) -> None:
    """Compile and test under a temporary name beside the library, then rename the record and the library.

    Raises: RuntimeError with the compiler's first error, OSError when nothing can be written there.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        made = Path(folder) / library.name
        command = [
            *compiler,
            *_flags(),
            *(f"-isystem{path}" for path in include_paths()),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(str(path) for path in _sources() if path.suffix == ".cpp"),
            *(f"-L{path}" for path in library_paths()),
            "-lc10",
            "-ltorch_cpu",
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.splitlines()
            raise RuntimeError(([line for line in lines if "error" in line] or lines or ["no message"])[0])
        record = {"sha256": hashlib.sha256(made.read_bytes()).hexdigest(), "self_test": run_self_test(made)}
        _record(made).write_text(json.dumps(record), encoding="utf-8")
        made.replace(library)
        _record(made).replace(_record(library))


def run_self_test(library: Path) -> str:
    """The result of a library's self-test, run in a process of its own; empty when it passes.

    Raises: RuntimeError when it does not end, which says nothing about the library.
    """
    environment = {**os.environ, "LISSOM_NATIVE": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "lissom.ops.native.self_test", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=_SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"their self-test did not end within {_SELF_TEST_SECONDS} seconds") from error
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return (lines or ["no message"])[-1] if done.returncode else ""
