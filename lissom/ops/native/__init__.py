"""The CPU kernels of our operators, in C++: built once for this machine's processor, kept, and loaded when first needed.

The build uses the compiler and the paths `torch.utils.cpp_extension` finds. It is one command rather than that module's `load`,
so that no `ninja` is needed and an interrupted build holds up no other: the library is written under a temporary name and
renamed, and the lock that makes other processes wait for it is the system's, which ends with its process. Kept libraries are
named by a hash of the sources, PyTorch's version, the compiler and the processor's features.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

SWITCH = "LISSOM_NATIVE"
"""Set this environment variable to 0 to go without the kernels."""

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++20", "-fPIC", "-shared", "-fopenmp", "-w")


@cache
def load_kernels() -> str:
    """Build the kernels if they are not kept yet, and load them; returns why there are none, or an empty text."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0 switches the C++ kernels off"
    if sys.platform != "linux":
        return f"the C++ kernels are built on Linux only, and this is {sys.platform}"
    compiler = _compiler()
    if compiler is None:
        return "there is no C++ compiler; install g++ (Debian: apt-get install g++) for Lissom's kernels"
    library = _cache_folder() / f"kernels-{_fingerprint(compiler)}.so"
    try:
        if not library.exists():
            _build_once(compiler, library)
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"the C++ kernels could not be built: {str(error).splitlines()[0]}"
    return ""


def kernel_dtypes() -> tuple[torch.dtype, ...]:
    """The dtypes the loaded kernels compute in; none where there are no kernels."""
    if load_kernels():
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.lissom.has_bfloat16() else (torch.float32,)


def missing_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why there is no kernel for values of that dtype there, in words for the history; None when there is one."""
    if device.type != "cpu":
        return f"it runs on {device.type}"
    missing = load_kernels()
    if missing:
        return missing
    return None if dtype in kernel_dtypes() else f"there is no kernel for {dtype} on this machine"


def missing_byte_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    """The same for products of eight-bit numbers, on values of that dtype."""
    reason = missing_kernel(dtype, device)
    if reason is None and not torch.ops.lissom.has_bytes():
        return "this processor lacks AVX2, whose instruction the kernel multiplies whole numbers with"
    return reason


def missing_stored_kernel(dtype: torch.dtype, device: torch.device) -> str | None:
    """The same for products of values of that dtype with integers stored in eight or four bits."""
    reason = missing_kernel(dtype, device)
    if reason is None and not torch.ops.lissom.has_stored():
        return "this processor lacks AVX2, with which the kernel turns stored integers into floats"
    return reason


def one_call(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function with its kernels' large results reusing each other's memory; 64 MB at most stay with the thread."""
    begin, end = torch.ops.lissom.begin_call.default, torch.ops.lissom.end_call.default

    def call(*args: object) -> Result:
        begin()
        try:
            return function(*args)
        finally:
            end()

    return call


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lissom"


def _sources() -> list[Path]:
    return sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")])


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [torch.__version__, version, _processor(), *_FLAGS, *(path.read_text(encoding="utf-8") for path in _sources())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """The processor's features, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _build_once(compiler: str, library: Path) -> None:
    """Build the library, or wait for the process that is building it. Raises: as `_build` does."""
    import fcntl  # exists on Unix only

    library.parent.mkdir(parents=True, exist_ok=True)
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(compiler, library)


def _build(compiler: str, library: Path) -> None:
    """Compile to a temporary name beside the library, then rename.

    Raises: RuntimeError with the compiler's first error, OSError when nothing can be written there.
    """
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as folder:
        made = Path(folder) / library.name
        command = [
            compiler,
            *_FLAGS,
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
            errors = (
                [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
            )
            raise RuntimeError(errors[0])
        made.replace(library)
