"""Tests of lissom.compiler.memory: huge pages, as Linux counts them."""

import gc
import platform
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lissom
from lissom.compiler import memory
from lissom.compiler.memory import collector_paused, copies, give_back_memory, use_huge_pages
from tests.support.models import normal

MIB = 1 << 20
RELEASE = tuple(int(part) for part in platform.release().split(".")[:2] if part.isdigit())
pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or RELEASE < (6, 1) or memory._huge_page_bytes() != 2 * MIB,
    reason="this system does not make huge pages of 2 MiB on request",
)


def mapping(tensor: torch.Tensor) -> str:
    """The mapping of the process that a tensor's memory begins in."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if low <= tensor.untyped_storage().data_ptr() < high:
            return line
    raise AssertionError("a tensor lies in no mapping")


def huge_bytes(tensor: torch.Tensor) -> int:
    """The bytes in huge pages of the mappings that a tensor's memory lies in."""
    first = tensor.untyped_storage().data_ptr()
    last, inside, found = first + tensor.untyped_storage().nbytes(), False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if not name.endswith(":"):
            low, high = (int(part, 16) for part in name.split("-"))
            inside = low < last and first < high
        elif inside and name == "AnonHugePages:":
            found += int(rest[0]) << 10
    return found


def test_large_tensor_in_huge_pages_keeps_its_values():
    x = torch.arange(16 * MIB // 4, dtype=torch.int32)
    place = x.data_ptr()
    use_huge_pages([x, x[5:], x])
    # All but the pages at both ends, of which less than half may be of the tensor.
    assert huge_bytes(x) >= 12 * MIB
    assert x.data_ptr() == place and torch.equal(x, torch.arange(16 * MIB // 4, dtype=torch.int32))


def test_no_memory_is_taken_for_a_little():
    whole = torch.zeros(64 * MIB, dtype=torch.uint8)
    page = -whole.data_ptr() % (2 * MIB) + 8 * MIB
    # A quarter of each of two pages: storages of their own within the memory of `whole`.
    little = [torch.frombuffer(whole.numpy(), dtype=torch.uint8, count=MIB // 2, offset=page + start) for start in (0, 3 * MIB)]
    before = huge_bytes(whole)
    use_huge_pages(little)
    assert huge_bytes(whole) == before
    use_huge_pages([whole])
    assert huge_bytes(whole) >= 60 * MIB


def test_system_that_must_not_use_them_is_not_asked(monkeypatch):
    monkeypatch.setattr(memory, "_huge_page_bytes", lambda: 0)
    x = torch.zeros(16 * MIB, dtype=torch.uint8)
    before = huge_bytes(x)
    use_huge_pages([x])
    assert huge_bytes(x) == before


@pytest.mark.parametrize(("size", "count"), [(2048, 2), (256, 40)], ids=["large", "small"])
def test_weights_of_compiled_model_lie_in_huge_pages(size: int, count: int):
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(count))).eval()
    compiled = lissom.compile(model, normal(3, size), checks="off")
    give_back_memory()
    weights = [weight for weight in compiled.program.weights().values() if weight.dim() > 1]
    places = {mapping(weight): huge_bytes(weight) for weight in weights}
    assert sum(places.values()) >= 0.75 * sum(weight.numel() * 4 for weight in weights)
    wanted = model(normal(2, size))
    # Sums of up to 2,048 float32 products through up to 40 layers.
    torch.testing.assert_close(compiled(normal(2, size)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_moved_keeps_its_values_and_its_sharing(inference: bool):
    with torch.inference_mode(inference):
        whole = torch.arange(MIB, dtype=torch.int32)
        check_moved(whole)


def check_moved(whole: torch.Tensor):
    rows, columns = whole.view(1024, 1024), whole.view(1024, 1024).T[3:]
    before = rows.clone()
    use_huge_pages([], own=[rows, columns])
    assert rows.data_ptr() % (2 * MIB) == 0 and rows.data_ptr() != whole.data_ptr() and huge_bytes(rows) >= 2 * MIB
    assert torch.equal(rows, before) and torch.equal(columns, before.T[3:]) and columns.stride() == (1, 1024)
    rows[0, 5] = -1
    assert columns[2, 0] == -1 and whole[5] == 5


def test_huge_pages_are_made_behind_the_caller():
    x = torch.arange(16 * MIB // 4, dtype=torch.int32)
    use_huge_pages([x], behind=True)
    x += 1  # while they are made
    wait_for_pages()
    assert huge_bytes(x) >= 12 * MIB
    assert torch.equal(x, torch.arange(16 * MIB // 4, dtype=torch.int32) + 1)


def wait_for_pages() -> None:
    for thread in threading.enumerate():
        if thread.name == "lissom-huge-pages":
            thread.join()


def test_nothing_starts_behind_the_caller_for_a_little():
    use_huge_pages([torch.zeros(1000)], behind=True)
    assert all(thread.name != "lissom-huge-pages" for thread in threading.enumerate())


def test_no_more_pages_are_made_when_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch):
    x = torch.zeros(16 * MIB, dtype=torch.uint8)
    before = huge_bytes(x)
    ended = threading.Thread()
    monkeypatch.setattr(threading, "main_thread", lambda: ended)
    use_huge_pages([x], behind=True)
    wait_for_pages()
    assert huge_bytes(x) == before


def test_tensors_live_until_their_pages_are_made():
    code = "import torch; from lissom.compiler.memory import use_huge_pages; use_huge_pages([torch.ones(1 << 28)], behind=True)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_copies_are_of_the_same_form_and_zeros_take_memory_when_written():
    tensors = {
        "zeros": torch.zeros(4, MIB),
        "flags": torch.zeros(3 * MIB, dtype=torch.bool),
        "negative": torch.full((5,), -0.0),
        "last": torch.tensor([0.0] * 6 + [1.0]),
        "across": torch.zeros(8, 4).T,
        "none": torch.zeros(0, 3),
        "one": torch.zeros(()),
        "complex": torch.zeros(2, dtype=torch.complex64),
    }
    before = resident_bytes()
    made = copies(tensors)
    assert resident_bytes() - before < 2 * MIB
    for name, tensor in tensors.items():
        assert torch.equal(made[name], tensor) and made[name].stride() == tensor.stride() and made[name].dtype is tensor.dtype
        assert not tensor.numel() or made[name].data_ptr() != tensor.data_ptr()
        made[name].fill_(1)
        assert torch.equal(made[name], torch.ones_like(tensor))
    assert torch.signbit(tensors["negative"]).all() and not tensors["zeros"].any()
    assert resident_bytes() - before > 16 * MIB


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_state_takes_memory_when_it_is_written():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(16, MIB))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept.add_(x)
            return self.kept[:, 0] * 1

    compiled = lissom.compile(Kept(), torch.ones(16, 1), checks="off")
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(f"{folder}/model")
        del compiled
        give_back_memory()
        before = resident_bytes()
        loaded = lissom.load(f"{folder}/model")
        assert resident_bytes() - before < 24 * MIB  # of 64, twice
        assert loaded(torch.ones(16, 1)).tolist() == [1.0] * 16
        assert loaded(torch.ones(16, 1)).tolist() == [2.0] * 16
        assert not loaded.program.weight("kept").any()


def test_other_kinds_of_tensors_are_left_alone():
    x = torch.eye(1024)
    kinds = [x.to_sparse(), x.to("meta"), torch.empty(0)]
    use_huge_pages(kinds, own=kinds)
    assert torch.equal(kinds[0].to_dense(), x)


def test_collector_pauses_and_goes_on():
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_command_sets_its_imports_and_then_its_heap_aside():
    code = """
import gc, runpy, sys
sys.argv = ["lissom", "--version"]
try:
    runpy.run_module("lissom", run_name="__main__")
except SystemExit:
    pass
from lissom.compiler.memory import heap_set_aside
imports, model = gc.get_freeze_count(), [[] for _ in range(1000)]
assert imports > 100_000 and gc.isenabled()
with heap_set_aside():
    assert gc.get_freeze_count() >= imports + 1000
assert not gc.get_freeze_count()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_mapped_file_is_not_moved(tmp_path: Path):
    save_file({"x": torch.ones(MIB)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        x = file.get_tensor("x")
    place = x.data_ptr()
    use_huge_pages([], own=[x])
    assert x.data_ptr() == place
