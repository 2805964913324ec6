"""The ceilings of this machine: matrix products in three dtypes and memory bandwidth, measured once and kept in a file."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch

from lissom.compiler.memory import use_huge_pages
from lissom.compiler.pipeline.options import Progress
from lissom.errors import ArtifactError
from lissom.io.fields import check_fields, count, optional, parse_json, real, take, take_list, text
from lissom.measure.timing import Timing, time_calls
from lissom.ops.native.instruction_sets import processor_features, processors

FORMAT_VERSION = 2
"""1 measured the memory in small pages."""
ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16"),
)
"""Instruction sets for matrix products, as Linux names them."""
_SIDES = (1024, 2048, 4096)
_LEAST_STREAM_BYTES = 256 << 20
_MOST_STREAM_BYTES = 2 << 30
_CPU = torch.device("cpu")
Call = Callable[[], object]


@dataclass(frozen=True)
class Ceiling:
    """A rate in 10⁹ per second: the median of several runs, their quartiles, and a description of the run."""

    median: float
    low: float
    high: float
    how: str


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of one device: operations per second of matrix products, and bytes per second of memory bandwidth.

    bf16 and int8 are None if PyTorch has no such product.
    """

    name: str
    fp32_gflops: Ceiling
    bf16_gflops: Ceiling | None
    int8_gops: Ceiling | None
    memory_gb_per_second: Ceiling


@dataclass(frozen=True)
class Machine:
    """A machine and its ceilings.

    Attributes:
        cores: physical cores this process may use.
        threads: PyTorch's threads.
        isa: the entries of `ISA` the processor has.
        l1d_bytes: first-level data cache of one core.
        l2_bytes: second-level cache of one core.
        l3_bytes: the shared cache; None if the system does not report them.
        torch: its version.
        measured: the date, in ISO format.
        devices: CUDA devices in their order.
    """

    cores: int
    threads: int
    isa: tuple[str, ...]
    l1d_bytes: int | None
    l2_bytes: int | None
    l3_bytes: int | None
    torch: str
    measured: str
    cpu: Ceilings
    devices: tuple[Ceilings, ...]

    def on(self, device: torch.device) -> Ceilings:
        """The ceilings of a device: the CPU's, or a CUDA device's by its index."""
        return self.devices[device.index or 0] if device.type == "cuda" else self.cpu


def measure_machine(seconds: float = 1.0, progress: Progress | None = None) -> Machine:
    """Measure this machine with PyTorch's own kernels and its current number of threads.

    Args:
        seconds: how long to run each product at each size.
        progress: called with the current device, the number of devices done, and the total.
    """
    caches = cache_bytes()
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    ceilings: list[Ceilings] = []
    for index, device in enumerate([_CPU, *devices]):
        if progress is not None:
            progress(device_name(device), index, len(devices) + 1)
        ceilings.append(_ceilings(device, seconds))
    return Machine(
        cores=core_count(),
        threads=torch.get_num_threads(),
        isa=instruction_sets(),
        l1d_bytes=caches.get("L1d"),
        l2_bytes=caches.get("L2"),
        l3_bytes=caches.get("L3"),
        torch=torch.__version__,
        measured=date.today().isoformat(),
        cpu=ceilings[0],
        devices=tuple(ceilings[1:]),
    )


def _ceilings(device: torch.device, seconds: float) -> Ceilings:
    with torch.inference_mode():
        fp32 = _product_ceiling(float_product(torch.float32, device), "linear", seconds)
        assert fp32 is not None
        return Ceilings(
            name=device_name(device),
            fp32_gflops=fp32,
            bf16_gflops=_product_ceiling(float_product(torch.bfloat16, device), "linear", seconds),
            int8_gops=(_product_ceiling(onednn_product, "qlinear_pointwise", seconds) if device == _CPU else None)
            or _product_ceiling(partial(int_product, device=device), "_int_mm", seconds),
            memory_gb_per_second=_memory_ceiling(device, seconds),
        )


def _product_ceiling(product: Callable[[int], Call], name: str, seconds: float) -> Ceiling | None:
    """The best median over sizes, each eight times the work of the previous; None if the product does not exist.

    Sizes whose calls are expected to take longer than `seconds` are skipped.
    """
    ceilings: list[Ceiling] = []
    for side in _SIDES:
        try:
            timing = time_calls({name: product(side)}, seconds)[name]
        except (RuntimeError, AttributeError, NotImplementedError):
            break
        ceilings.append(_rate(2 * side**3, timing, f"{name} {side}³"))
        if 8 * timing.median_ms > 1e3 * seconds:
            break
    return max(ceilings, key=lambda ceiling: ceiling.median, default=None)


def float_product(dtype: torch.dtype, device: torch.device) -> Callable[[int], Call]:
    """For a side n, a call that multiplies [n, n] by the weight [n, n] of a linear layer."""

    def product(side: int) -> Call:
        x, weight = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        return lambda: torch.nn.functional.linear(x, weight)

    return product


def onednn_product(side: int) -> Call:
    """A call of the int8 product: uint8 activations, prepacked int8 weight, float32 output, scales 1 and zero points 0.

    Activations are uint8 because int8 ones were hundreds of times slower on AVX-512 without AMX (torch 2.13).
    """
    operators = torch.ops.onednn
    x, weight = _integers(side, torch.uint8, _CPU), _integers(side, torch.int8, _CPU)
    packed = operators.qlinear_prepack(weight, [side, side])
    scales, zero_points = torch.ones(side), torch.zeros(side, dtype=torch.int64)
    out = torch.float32
    return lambda: operators.qlinear_pointwise(x, 1.0, 0, packed, scales, zero_points, None, 1.0, 0, out, "none", [], "")


def int_product(side: int, device: torch.device = _CPU) -> Call:
    """A call of the int8 product with int32 output, by the operator that all devices may support."""
    x, weight = (_integers(side, torch.int8, device) for _ in range(2))
    return lambda: torch.ops.aten._int_mm(x, weight.T)


def _integers(side: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 127, (side, side), dtype=dtype, device=device)


def _memory_ceiling(device: torch.device, seconds: float) -> Ceiling:
    """The higher rate of reading and of copying more than any cache holds; a copy moves each byte twice."""
    size = max(_LEAST_STREAM_BYTES, min(2 * shared_cache_bytes(), _MOST_STREAM_BYTES))
    source = torch.zeros(size // 4, device=device).fill_(1.0)
    target = torch.empty_like(source).fill_(0.0)
    use_huge_pages([source, target])  # as those of weights are
    timings = time_calls({"read": source.sum, "copy": lambda: target.copy_(source)}, seconds)
    rates = [_rate(size * (1 + (name == "copy")), timing, f"{name} {size >> 20} MiB") for name, timing in timings.items()]
    return max(rates, key=lambda ceiling: ceiling.median)


def _rate(amount: int, timing: Timing, how: str) -> Ceiling:
    median, low, high = (amount / (ms * 1e6) for ms in (timing.median_ms, timing.high_ms, timing.low_ms))
    return Ceiling(median, low, high, how)


def device_name(device: torch.device) -> str:
    """The processor's or the CUDA device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = next((line["model name"] for line in processors() if "model name" in line), "")
    return named or platform.processor() or platform.machine()


def core_count() -> int:
    """Physical cores this process may use, two threads of one core counted once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {
        (line.get("physical id"), line["core id"])
        for line in processors()
        if "core id" in line and int(line.get("processor", -1)) in usable
    }
    return len(cores) or len(usable)


def instruction_sets() -> tuple[str, ...]:
    """The entries of `ISA` the processor has; none if the system does not report them."""
    return tuple(name for name in ISA if name in processor_features())


def cache_bytes() -> dict[str, int]:
    """The cache sizes of the first core: L1d, L2, L3, as far as the system reports them."""
    sizes: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with suppress(OSError, ValueError):
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                sizes[f"L{level}d" if kind == "Data" else f"L{level}"] = int(size.removesuffix("K")) << 10
    return sizes


def shared_cache_bytes() -> int:
    """The total size of all L3 caches, of which a large processor has several; 0 if the system does not report them."""
    sharers: set[str] = set()
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3/shared_cpu_list"):
        with suppress(OSError):
            sharers.add(path.read_text().strip())
    return len(sharers) * cache_bytes().get("L3", 0)


def cache_path() -> Path:
    """The file of this machine's ceilings: one for each processor, number of threads and version of PyTorch.

    Raises:
        ArtifactError: if the user has no home directory.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        directory = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError as error:
        raise ArtifactError("there is no home directory to keep a file in; set XDG_CACHE_HOME to a directory") from error
    model = hashlib.sha256(device_name(_CPU).encode()).hexdigest()[:12]
    return directory / "lissom" / f"machine-{model}-{torch.get_num_threads()}-threads-torch-{torch.__version__}.json"


def load_machine() -> Machine | None:
    """The saved ceilings of this machine; None if not measured yet, or if the file is damaged or of another version."""
    try:
        path = cache_path()
        data = parse_json(path.read_bytes(), path)
        saved = _from_json(data) if take(data, "version", int) == FORMAT_VERSION else None
    except (OSError, ValueError, ArtifactError):
        return None
    present = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return saved if saved is not None and [device.name for device in saved.devices] == present else None


def save_machine(machine: Machine) -> Path:
    """Save the ceilings for `load_machine`; the file is written completely or not at all.

    Raises:
        ArtifactError: if the directory cannot be written.
    """
    path = cache_path()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    content = json.dumps({"version": FORMAT_VERSION, **asdict(machine)}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a directory that can"
        ) from error
    return path


def _from_json(data: object) -> Machine:
    check_fields(data, Machine, "version")
    return Machine(
        cores=count(take(data, "cores", int)),
        threads=count(take(data, "threads", int)),
        isa=take_list(data, "isa", text),
        l1d_bytes=optional(data, "l1d_bytes", count),
        l2_bytes=optional(data, "l2_bytes", count),
        l3_bytes=optional(data, "l3_bytes", count),
        torch=take(data, "torch", str),
        measured=take(data, "measured", str),
        cpu=_device(take(data, "cpu", dict)),
        devices=take_list(data, "devices", _device),
    )


def _device(data: object) -> Ceilings:
    check_fields(data, Ceilings)
    return Ceilings(
        name=take(data, "name", str),
        fp32_gflops=_ceiling(take(data, "fp32_gflops", dict)),
        bf16_gflops=optional(data, "bf16_gflops", _ceiling),
        int8_gops=optional(data, "int8_gops", _ceiling),
        memory_gb_per_second=_ceiling(take(data, "memory_gb_per_second", dict)),
    )


def _ceiling(data: object) -> Ceiling:
    check_fields(data, Ceiling)
    median, low, high = (real(take(data, name, object)) for name in ("median", "low", "high"))
    return Ceiling(median, low, high, take(data, "how", str))
