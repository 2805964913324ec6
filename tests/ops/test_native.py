"""The kernels' memory: results of one call reuse each other's, and nothing a caller holds is written to."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lissom.ops.native import _build_once, load_kernels, one_call
from lissom.ops.packed_linear import pack, packed_linear

MISSING = load_kernels()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

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


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux only")
def test_who_comes_while_the_kernels_are_built_waits_and_builds_nothing(tmp_path):
    compiler, library, log = tmp_path / "compiler", tmp_path / "cache" / "kernels-0.so", tmp_path / "log"
    # It takes a while and writes its last argument, the library, as a compiler does.
    compiler.write_text(f'#!/bin/sh\necho built >> "{log}"\nsleep 0.2\nfor path; do :; done\necho library > "$path"\n')
    compiler.chmod(0o755)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(_build_once, str(compiler), library) for _ in range(3)]:
            done.result()
    assert library.read_text() == "library\n"
    assert log.read_text() == "built\n"
