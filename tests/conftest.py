"""Options, markers and fixtures all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LISSOM_KEPT_DECODERS", "0")
os.environ.setdefault("LISSOM_KERNELS", "ours")  # which is faster depends on the load
# With sizes that vary, PyTorch computes each output twice to fill this cache, and two layers hit it too rarely: 30 to 40 % of
# an export of a small model. From some ten layers on it pays, so only tests do without it.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
# One core a test process: OpenMP's threads wait for each other by spinning, and where two processes have a thread for every
# core, they slow each other down many times over. Set before torch is imported, and for the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import gc
from collections.abc import Generator

import pytest
import torch
from hypothesis import settings

from lissom.frontends.models.huggingface import Checkpoint, load
from tests.support import captures
from tests.support.models import Case, feed_forward, tiny_bert, tiny_llama

# Exports make millions of objects that live for a moment, beside a large heap that stays: a tenth of the time would go here.
gc.set_threshold(20_000)

# A first example imports and compiles more than the next; how long one takes is no property of what is tested.
# The same examples in every run; `--hypothesis-profile=nightly` draws many more, and others each time.
settings.register_profile("lissom", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("lissom")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow or multiprocess too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips: dict[str, pytest.MarkDecorator] = {}
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow; run with --slow")
        skips["multiprocess"] = pytest.mark.skip(reason="starts processes of its own; run with --slow")
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Generator[None]:
    """The GPU of a test marked gpu, pretended on a machine without one, unless the test needs a real one."""
    marker = request.node.get_closest_marker("gpu")
    if marker is not None and not torch.cuda.is_available():
        if marker.kwargs.get("real"):
            pytest.skip("needs a CUDA device")
        from tools.pretend_cuda import pretend_cuda  # imports Dynamo, which few tests need

        with pretend_cuda():
            yield
    else:
        yield


@pytest.fixture(params=[feed_forward, tiny_bert, tiny_llama], ids=lambda build: build.__name__)
def case(request: pytest.FixtureRequest) -> Case:
    """A hand-written block, an encoder and a decoder in turn."""
    return request.param()


@pytest.fixture(scope="session")
def minilm() -> Checkpoint:
    """all-MiniLM-L6-v2 with its tokenizer: a real model with real weights, loaded once."""
    return load("minilm")


@pytest.fixture
def shared_captures() -> Generator[None]:
    """Equal models are captured once a session in tests with this fixture, whatever compiles them in this process."""
    with captures.shared():
        yield
