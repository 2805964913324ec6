"""Finds the library of C++ kernels for this processor: in the package, in a private cache, or built into that cache.

A wheel holds the libraries of all instruction sets (`python -m tools.wheel`). Elsewhere each is built once. The libraries use
PyTorch's stable C interface, so one works with every PyTorch from 2.11 on, and needs no OpenMP of its own.

The build is one compiler command rather than `torch.utils.cpp_extension.load`: it needs no `ninja`, and an interrupted build
blocks no other. A library is written under a temporary name and renamed. Other processes wait for a file lock, which the
system releases when its process ends. The file name holds the instruction set and a hash of the sources and the flags, so that
a library from the cache needs no compiler.

A record in the cache holds its hash, which is checked before loading, and the result of its self-test for each kind of
processor that ran it. The self-test is a process that compares every kernel with its reference, since a loaded library cannot
be unloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lissom.io.processes import python_command, python_environment, signal_name
from lissom.ops.native.instruction_sets import INSTRUCTION_SETS, InstructionSet, processor_features, usable_sets

FLAGS = "LISSOM_CXXFLAGS"
"""Set this environment variable to compiler flags that follow Lissom's own, such as `-O1 -g`."""

_FOLDER = Path(__file__).parent
_SHIPPED = _FOLDER / "libraries"
"""The libraries that a wheel holds."""
_STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"
"""The stable interface of PyTorch 2.11."""
_FLAGS = ("-O3", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-w", _STABLE)
_SELF_TEST_SECONDS = 600
FAILED = 3
"""The exit status of a self-test that found a fault of the library; Python ends with 1 or 2 for any other reason."""
_FAULTS = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)
"""The signals that end the self-test of a faulty library. Others, such as SIGKILL, come from outside."""


def kept_library() -> Path:
    """The library for this processor: the package's own, or the one in the cache, built if it is missing or was damaged.

    Raises:
        RuntimeError: with the reason why there is none.
        OSError: likewise.
        UnsupportedError: for an instruction set that was asked for and is not there.
    """
    reason = ""
    for isa in usable_sets():
        shipped = shipped_library(isa)
        library = shipped or built_library(isa)
        failure = self_test_of(library)
        if failure is None and shipped:
            failure = _test_once(shipped)
        elif failure is None:
            compiler = find_compiler()
            reason = _unsupported(compiler, isa)
            if reason:
                continue
            build_once(compiler, library, isa)
            failure = self_test_of(library)
        if failure:
            again = "to test them again" if shipped else "to build them again"
            raise RuntimeError(f"the C++ kernels failed their self-test: {failure}; delete {_record(library)} {again}")
        return library
    raise RuntimeError(reason)


def shipped_library(isa: InstructionSet) -> Path | None:
    """The library that the installed package holds; None where it holds none, or other compiler flags are asked for."""
    library = _SHIPPED / shipped_name(isa)
    return library if library.is_file() and not os.environ.get(FLAGS) else None


def shipped_name(isa: InstructionSet) -> str:
    """The file name of a library in a wheel. The compiler that built it is no part of it."""
    return _name(isa, "")


def build_all() -> dict[str, str | None]:
    """Build the libraries of all instruction sets for machines that share this cache; for each why it failed, or None.

    A library that this processor cannot run is tested by the first machine that can.

    Raises:
        RuntimeError: where nothing can be built.
        OSError: likewise.
    """
    compiler, reasons = find_compiler(), dict[str, str | None]()
    for isa in INSTRUCTION_SETS:
        reasons[isa.name] = _unsupported(compiler, isa)
        if reasons[isa.name] is None:
            build_once(compiler, built_library(isa), isa)
    return reasons


def built_library(isa: InstructionSet) -> Path:
    """The path of the library of an instruction set in the cache, once it is built."""
    return cache_folder() / _name(isa, os.environ.get("CXX", ""))


def find_compiler() -> list[str]:
    """The command that compiles C++: CXX where it is set. Raises RuntimeError when there is no such program."""
    given = _words("CXX")
    if given and shutil.which(given[0]) is None:
        raise RuntimeError(f"CXX names the compiler '{given[0]}', and there is no such program")
    if given:
        return given
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("there is no C++ compiler; install g++ (Debian: apt-get install g++) for Lissom's kernels")
    return [compiler]


def _words(name: str) -> list[str]:
    """The words of an environment variable. Raises RuntimeError if a quote is not closed."""
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        raise RuntimeError(f"{name} cannot be split into words: {error}") from error


def _unsupported(compiler: list[str], isa: InstructionSet) -> str | None:
    """The reason the compiler cannot build for an instruction set; None if it can."""
    command = [*compiler, *isa.flags, "-E", "-x", "c++", os.devnull, "-o", os.devnull]
    done = _run(command)
    return _first_error(done.stderr) if done.returncode else None


def cache_folder() -> Path:
    """The folder of the libraries, which only this user may write to; created if it does not exist.

    Where the user's cache cannot be used, a folder for temporary files, with a warning.

    Raises:
        OSError: when that cannot be used either.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return _private((given if given.is_absolute() else Path.home() / ".cache") / "lissom")
    except (OSError, RuntimeError) as error:
        folder = _private(Path(tempfile.gettempdir()) / f"lissom-{os.getuid()}")
        warnings.warn(f"Lissom keeps its C++ kernels in {folder} because its cache cannot be used: {error}", stacklevel=2)
        return folder


def _private(folder: Path) -> Path:
    """The folder, created if it does not exist. Raises OSError when others can write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if not status.st_uid == folder.lstat().st_uid == os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if status.st_mode & 0o022:
        raise PermissionError(f"{folder} can be written to by other users (chmod go-w it, or set XDG_CACHE_HOME)")
    return folder


def self_test_of(library: Path) -> str | None:
    """The recorded result of a library's self-test on this kind of processor, empty when it passed.

    None for a library that is missing, was changed, or was not tested on such a processor.
    """
    tests = _self_tests(library)
    return None if tests is None else tests.get(processor_kind())


def _self_tests(library: Path) -> Mapping[str, str] | None:
    """The recorded self-tests of a library by kind of processor; None when it is missing or was changed."""
    try:
        record = json.loads(_record(library).read_text(encoding="utf-8"))
        if record["sha256"] != _hash_of(library):
            return None
        return {str(key): str(value) for key, value in record["self_tests"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def build_once(compiler: list[str], library: Path, isa: InstructionSet) -> None:
    """Build and test the library, or wait for the process that does. Raises as `_build` does."""
    with locked(library.with_suffix(".lock")):
        if _self_tests(library) is None:
            _build(compiler, library, isa)
        tests = _self_tests(library) or {}
        if not isa.missing and processor_kind() not in tests:
            _write_record(library, _record(library), {**tests, processor_kind(): run_self_test(library)})


def _test_once(library: Path) -> str:
    """The result of the self-test of a library of the package, run here or by another process meanwhile."""
    with locked(_record(library).with_suffix(".lock")):
        failure = self_test_of(library)
        if failure is None:
            failure = run_self_test(library)
            _write_record(library, _record(library), {**(_self_tests(library) or {}), processor_kind(): failure})
        return failure


@contextmanager
def locked(file: Path) -> Generator[None]:
    """Hold the lock of a file; other processes wait for it. The system releases it when this process ends.

    Raises:
        OSError: when the file cannot be written.
    """
    import fcntl  # exists on Unix only

    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _record(library: Path) -> Path:
    """The file of a library's hash and self-tests: beside it, or in the cache where the package holds the library."""
    folder = cache_folder() if library.parent == _SHIPPED else library.parent
    return folder / f"{library.stem}.json"


def _write_record(library: Path, record: Path, tests: Mapping[str, str]) -> None:
    made = record.with_suffix(".new")
    made.write_text(json.dumps({"sha256": _hash_of(library), "self_tests": tests}), encoding="utf-8")
    made.replace(record)


def _hash_of(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _sources() -> list[Path]:
    return sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")])


def _flags(isa: InstructionSet) -> list[str]:
    return [*_FLAGS, *isa.flags, f'-DLISSOM_ISA="{isa.name}"', *_words(FLAGS)]


def _name(isa: InstructionSet, compiler: str) -> str:
    native = processor_kind() if "-march=native" in isa.flags else ""
    given = [compiler, native, *_flags(isa)]
    parts = [*given, *(path.read_text(encoding="utf-8") for path in _sources())]
    return f"kernels-{isa.name}-{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:20]}.so"


def processor_kind() -> str:
    """The kind of processor: a hash of its features."""
    return hashlib.sha256(" ".join(sorted(processor_features())).encode()).hexdigest()[:12]


def _build(compiler: list[str], library: Path, isa: InstructionSet) -> None:
    """Compile under a temporary name beside the library, then rename the library and its record, which holds no self-test yet.

    Raises:
        RuntimeError: with the compiler's first error.
        OSError: when nothing can be written there.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        made = Path(folder) / library.name
        command = [
            *compiler,
            *_flags(isa),
            *(f"-isystem{path}" for path in include_paths()),
            *(str(path) for path in _sources() if path.suffix == ".cpp"),
            *(f"-L{path}" for path in library_paths()),
            "-ltorch_cpu",
            "-o",
            str(made),
        ]
        done = _run(command)
        if done.returncode:
            raise RuntimeError(_first_error(done.stderr))
        _write_record(made, _record(made), {})
        made.replace(library)
        _record(made).replace(_record(library))


def _first_error(output: str) -> str:
    lines = output.splitlines()
    return ([line for line in lines if "error" in line] or lines or ["no message"])[0]


def run_self_test(library: Path) -> str:
    """The result of a library's self-test, run in a process of its own; empty when it passes.

    Raises:
        RuntimeError: when it cannot run or does not end, which says nothing about the library.
    """
    command = python_command("lissom.ops.native.self_test", str(library))
    try:
        done = _run(command, env=python_environment(LISSOM_NATIVE="0"), timeout=_SELF_TEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"their self-test did not end within {_SELF_TEST_SECONDS} seconds") from error
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == FAILED:
        return last
    ended = f"it was ended by {signal_name(-done.returncode)}" if done.returncode < 0 else last
    if -done.returncode in _FAULTS:
        return ended
    raise RuntimeError(f"their self-test could not run: {ended}")


def _run(
    command: list[str], *, env: Mapping[str, str] | None = None, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command. Bytes of its output that are not UTF-8 are replaced."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=env, timeout=timeout)
