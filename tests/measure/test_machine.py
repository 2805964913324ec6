"""Tests of lissom.measure.machine: what is measured are real products, and what is kept comes back."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lissom.errors import ArtifactError
from lissom.measure import machine
from lissom.measure.machine import Ceiling, Ceilings, Machine, cache_path, load_machine, measure_machine, save_machine
from lissom.ops.native.instruction_sets import processor_features

CPU = torch.device("cpu")


def ceilings(name: str = "a processor") -> Ceilings:
    return Ceilings(
        name,
        fp32_gflops=Ceiling(100.0, 90.0, 110.0, "linear 2048³"),
        bf16_gflops=Ceiling(200.0, 190.0, 210.0, "linear 2048³"),
        int8_gops=None,
        memory_gb_per_second=Ceiling(10.0, 9.0, 11.0, "copy 256 MiB"),
    )


def example(**changes: object) -> Machine:
    known = Machine(
        cores=4,
        threads=2,
        isa=("avx2", "fma"),
        l1d_bytes=32 << 10,
        l2_bytes=1 << 20,
        l3_bytes=None,
        torch="2.11.0",
        measured="2026-01-31",
        cpu=ceilings(),
        devices=(),
    )
    return dataclasses.replace(known, **changes)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return tmp_path / "lissom"


@pytest.fixture(scope="module")
def measured() -> Machine:
    return measure_machine(seconds=0.001)


def rates(found: Ceilings) -> list[Ceiling]:
    return [item for item in vars(found).values() if isinstance(item, Ceiling)]


def test_a_measurement_has_rates_with_their_spread(measured):
    assert len(rates(measured.cpu)) >= 2
    assert all(0 < rate.low <= rate.median <= rate.high for rate in rates(measured.cpu))
    assert measured.cpu.fp32_gflops.how.startswith("linear ")
    assert measured.cpu.memory_gb_per_second.how.startswith(("read ", "copy "))


def test_a_measurement_says_of_what(measured):
    assert measured.cpu.name == machine.device_name(CPU) != ""
    assert (measured.threads, measured.torch) == (torch.get_num_threads(), torch.__version__)
    assert measured.cores >= 1
    assert len(measured.devices) == torch.cuda.device_count()


def test_a_measurement_survives_being_kept(measured, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_machine(measured)
    assert load_machine() == measured


def test_progress_names_the_device(monkeypatch):
    monkeypatch.setattr(machine, "_ceilings", lambda device, *_: ceilings(str(device)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    seen: list[tuple[str, int, int]] = []
    found = measure_machine(progress=lambda *item: seen.append(item))
    assert seen == [(machine.device_name(CPU), 0, 2), ("a card", 1, 2)]
    assert found.on(CPU).name == "cpu"
    assert found.on(torch.device("cuda", 0)).name == found.on(torch.device("cuda")).name == "cuda:0"


def test_a_float_product_is_a_product():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = machine.float_product(torch.float32, CPU)(16)()
        torch.manual_seed(0)
        x, weight = torch.randn(16, 16), torch.randn(16, 16)
    torch.testing.assert_close(found, x @ weight.T)


@pytest.mark.parametrize("product", [machine.onednn_product, machine.int_product])
def test_an_integer_product_is_exact(product, monkeypatch):
    made: list[torch.Tensor] = []
    draw = machine._integers

    def kept(*arguments: object) -> torch.Tensor:
        made.append(draw(*arguments))
        return made[-1]

    monkeypatch.setattr(machine, "_integers", kept)
    try:
        found = product(32)()
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"PyTorch has no such product here: {error}")
    x, weight = (tensor.long() for tensor in made)
    assert torch.equal(found.long(), x @ weight.T)


def test_a_product_that_does_not_exist_has_no_ceiling():
    def missing(side: int) -> object:
        raise NotImplementedError("no kernel")

    assert machine._product_ceiling(missing, "nothing", 0.001) is None


def test_a_rate_is_work_over_time():
    timing = machine.Timing(median_ms=2.0, low_ms=1.0, high_ms=4.0, runs=5)
    assert machine._rate(8_000_000, timing, "work") == Ceiling(4.0, 2.0, 8.0, "work")


def test_the_file_is_named_after_processor_threads_and_torch(cache):
    name = cache_path().name
    assert cache_path().parent == cache
    assert f"-{torch.get_num_threads()}-threads-torch-{torch.__version__}.json" in name
    other = pytest.MonkeyPatch()
    with other.context() as patch:
        patch.setattr(machine, "device_name", lambda device: "another processor")
        assert cache_path().name != name


def test_without_xdg_the_file_is_in_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_path().parent == tmp_path / ".cache" / "lissom"


def test_what_was_kept_comes_back(cache):
    assert load_machine() is None
    path = save_machine(example())
    assert path == cache_path()
    assert load_machine() == example()
    assert list(cache.iterdir()) == [path]


def test_keeping_again_replaces_what_was_kept(cache):
    save_machine(example())
    save_machine(example(measured="2026-02-01"))
    assert load_machine() == example(measured="2026-02-01")


@pytest.mark.parametrize(
    "change",
    [
        lambda data: "{",
        lambda data: "[]",
        lambda data: json.dumps(data | {"version": 0}),
        lambda data: json.dumps({key: value for key, value in data.items() if key != "cpu"}),
        lambda data: json.dumps(data | {"more": 1}),
        lambda data: json.dumps(data | {"devices": [data["cpu"]]}),
        lambda data: json.dumps(data | {"cpu": 3}),
        lambda data: json.dumps(data | {"devices": [3]}),
        lambda data: json.dumps(data | {"cores": "many"}),
        lambda data: json.dumps(data | {"cpu": data["cpu"] | {"memory_gb_per_second": {"median": "fast"}}}),
        lambda data: "[" * 100_000,
    ],
    ids=[
        *("cut short", "a list", "another version", "a field less", "a field more", "a device that is gone"),
        *("a number for a device", "a number in devices", "text for a number", "text for a rate", "nested deeply"),
    ],
)
def test_file_that_does_not_fit_counts_as_missing(cache, change):
    path = save_machine(example())
    path.write_text(change(json.loads(path.read_text())))
    assert load_machine() is None


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.write_text("a file where the directory should be")
    with pytest.raises(ArtifactError) as raised:
        save_machine(example())
    assert str(raised.value) == (f"{cache_path()} cannot be written (File exists); set XDG_CACHE_HOME to a directory that can")


def test_a_write_that_fails_leaves_what_was_kept(cache, monkeypatch):
    path = save_machine(example())

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        save_machine(example(measured="2026-02-01"))
    assert load_machine() == example()
    assert list(cache.iterdir()) == [path]


PROCESSORS = """processor\t: 0
model name\t: A Chip @ 3.0 GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512_vnni fma

processor\t: 1
model name\t: A Chip @ 3.0 GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu avx2 avx512_vnni fma

processor\t: 2
model name\t: A Chip @ 3.0 GHz
physical id\t: 0
core id\t\t: 1
flags\t\t: fpu avx2 avx512_vnni fma
"""


@pytest.fixture
def features_read_anew() -> Iterator[None]:
    processor_features.cache_clear()
    yield
    processor_features.cache_clear()


def test_threads_of_one_core_count_once(monkeypatch, features_read_anew):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: PROCESSORS)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert machine.core_count() == 2
    assert machine.device_name(CPU) == "A Chip @ 3.0 GHz"
    assert machine.instruction_sets() == ("avx2", "fma", "avx512_vnni")


def test_cores_the_process_may_not_use_do_not_count(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self, **_: PROCESSORS)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert machine.core_count() == 1


def test_a_system_that_tells_nothing_is_no_error(monkeypatch, features_read_anew):
    def missing(self: Path, **_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine.core_count() >= 1
    assert machine.instruction_sets() == ()
    assert machine.cache_bytes() == {}
    assert machine.shared_cache_bytes() == 0
    assert machine.device_name(CPU) != ""


@pytest.mark.gpu(real=True)
def test_a_card_has_ceilings_above_the_processors(measured):
    card = measured.on(torch.device("cuda", 0))
    assert card.name == torch.cuda.get_device_name(0)
    assert card.bf16_gflops is not None
    assert card.memory_gb_per_second.median > measured.cpu.memory_gb_per_second.median
    assert card.fp32_gflops.median > measured.cpu.fp32_gflops.median


def test_saving_without_home_directory_fails_with_sentence(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert load_machine() is None
    with pytest.raises(ArtifactError, match="there is no home directory to keep a file in; set XDG_CACHE_HOME"):
        cache_path()
