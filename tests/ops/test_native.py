"""The kernels' memory: results of one call reuse each other's, and nothing a caller holds is written to."""

import subprocess
import sys
import threading

import pytest
import torch

from lissom.ops import native
from lissom.ops.native import load_kernels, one_call
from lissom.ops.packed_linear import pack, packed_linear
from tests.support import captures

MISSING = load_kernels()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=str(MISSING))

WIDTH = 512  # results of 1,024 rows are 2 MB: large ones are kept


def weights():
    return pack(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)) / 16)


def chain(x, weight):
    places = []
    for _ in range(6):
        x = packed_linear(x, weight, features=WIDTH)
        places.append(x.data_ptr())
    return x, places


@torch.inference_mode()
def test_results_of_one_call_take_each_others_place():
    _, places = one_call(chain)(torch.randn(1024, WIDTH), weights())
    assert len(set(places)) == 2


@torch.inference_mode()
def test_what_the_caller_holds_stays_as_it_is():
    x, weight = torch.randn(1024, WIDTH), weights()
    first, _ = one_call(chain)(x, weight)
    kept = first.clone()
    view = first[:10]
    del first
    second, _ = one_call(chain)(x * 2, weight)
    assert torch.equal(view, kept[:10])
    assert not torch.equal(second, kept)


@torch.inference_mode()
def test_a_call_that_fails_ends():
    def fails():
        raise ValueError

    with pytest.raises(ValueError):
        one_call(fails)()
    x = torch.randn(1024, WIDTH)
    a, b = packed_linear(x, weights(), features=WIDTH), packed_linear(x, weights(), features=WIDTH)
    assert a.data_ptr() != b.data_ptr()


def test_results_may_be_freed_by_another_thread():
    weight, held = weights(), []

    def work():
        with torch.inference_mode():
            held.append(one_call(chain)(torch.ones(1024, WIDTH), weight)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(item, held[0]) for item in held)
    held.clear()


def test_an_end_without_a_begin_is_refused():
    with pytest.raises(RuntimeError, match="end_call without a begin_call on this thread"):
        torch.ops.lissom.end_call()
    assert one_call(lambda x: x + 1)(1) == 2


def test_the_instructions_of_a_dtype(monkeypatch):
    own = torch.ops.lissom.instruction_set()
    # There are tiles for bfloat16 and int8 only.
    assert native.instructions_for(torch.float32) == ("avx512_bf16" if own == "amx" else own)
    monkeypatch.setattr(torch.ops.lissom, "instruction_set", lambda: "amx")
    for allowed, found in ((True, "amx"), (False, "avx512_bf16, as the operating system refuses AMX")):
        monkeypatch.setattr(torch.ops.lissom, "use_amx", lambda allowed=allowed: allowed)
        assert native.instructions_for(torch.bfloat16) == native.instructions_for(torch.int8) == found
        assert native.instructions_for(torch.float32) == "avx512_bf16"
        monkeypatch.setattr(torch.ops.lissom, "dots_bfloat16", lambda: False)
        assert native.multiplies_bfloat16() is allowed


def test_amx_that_the_system_refuses_is_told(monkeypatch):
    monkeypatch.setattr(torch.ops.lissom, "instruction_set", lambda: "amx")
    before = torch.ops.lissom.use_amx()
    torch.ops.lissom.use_amx(False)
    told = "the operating system does not permit AMX, so the kernels use AVX-512"
    assert native.refused_tiles() == native.describe_kernels() == told
    compiled = captures.compile(torch.nn.Linear(8, 8), torch.ones(2, 8))
    assert told in " ".join(str(compiled.report).split())
    monkeypatch.undo()
    torch.ops.lissom.use_amx(before)
    assert native.refused_tiles() is None or not before


# In a process of its own: reading such a tensor would end it.
WITHOUT_MEMORY = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from lissom.ops.native import load_kernels
from lissom.ops.packed_linear import pack
assert not load_kernels()
ops, weight = torch.ops.lissom, pack(torch.ones(4, 8))
chain = ops.make_chain(["aten::unsqueeze"], [0, 1, 1, 2, 1, 0, 4, 0, 0], [], [], [], 1, 0, 2, [1])
freed, fake = torch.ones(3, 8), FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.ones(3, 8))
freed.untyped_storage().resize_(0)
for x in (freed, fake, torch.ones(3, 8, device="meta")):
    for call in (lambda: ops.packed_linear(x, weight, features=4), lambda: ops.run_chain(chain, [x], [])[0].abs()):
        try:
            found = call()
            print(type(found).__name__, found.device)
        except (RuntimeError, NotImplementedError) as error:
            print(str(error).splitlines()[0][:40])
print(ops.packed_linear(torch.ones(3, 8)[:0], weight, features=4).shape, ops.run_chain(chain, [torch.ones(3)[:0]], [])[0].shape)
"""


def test_tensors_without_memory_are_not_read():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    freed, same, fake, fake_chain, meta, meta_chain, empty = done.stdout.splitlines()
    assert freed == same and freed.startswith("a tensor has no memory")
    # The operators have fake forms, and a chain has none.
    assert fake == "FakeTensor cpu" and meta == "Tensor meta"
    assert "run_chain" in fake_chain and "run_chain" in meta_chain
    assert empty == "torch.Size([0, 4]) torch.Size([1, 0])"
