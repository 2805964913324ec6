"""Tests of lissom.backends.openvino.backend: the backend, its options, and what it refuses."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.openvino.backend import BIN, XML, OpenVino
from lissom.compiler.verify.divergence import relative_error, run_samples, tolerance_of
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.capture.export import capture
from tests.backends.threaded_calls import compiled, differing_calls
from tests.support.decoders import decoder, prompt
from tests.support.models import CASES, capture_of, captured, feed_forward, normal, tiny_bert, tiny_gpt2, tokens
from tests.support.onnx_files import tiny_vit

openvino = pytest.importorskip("openvino", reason="openvino is not installed: pip install 'lissom[openvino]'")


@pytest.fixture(scope="module")
def built():
    """A feed-forward in OpenVINO."""
    found = capture_of("feed_forward")
    return found, OpenVino().build(found.program, found.example)


@pytest.fixture(scope="module")
def fast_bert():
    """A tiny encoder, and it compiled."""
    case = tiny_bert()
    return case, lissom.compile(case.model, case.inputs, backend=OpenVino())


SLOW = {"bert_eager", "llama", "llama_eager", "t5", "gpt2", "blocked", "convolution"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_every_model_runs_at_other_sizes(name):
    found = capture_of(name)
    network = OpenVino().build(found.program, found.example)
    sample = found.program.signature.resize(found.example, {symbol: 4 for symbol in found.program.signature.dimensions})
    (wanted,) = run_samples(found.program, [sample])
    assert max(map(relative_error, wanted, network(sample))) < tolerance_of(captured(name))


def test_float32_is_computed_in_float32(built, fast_bert):
    found, network = built
    for batch, sequence in [(1, 1), (1, 9), (4, 3)]:
        x = normal(batch, sequence, 8, seed=batch)
        # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8; bfloat16 is off by 4e-3.
        torch.testing.assert_close(network([x])[0], found.program.run([x])[0], rtol=1e-5, atol=1e-6)
    case, fast = fast_bert
    # Two layers of float32.
    torch.testing.assert_close(
        fast(**case.inputs).last_hidden_state, case.model(**case.inputs).last_hidden_state, rtol=1e-4, atol=1e-5
    )
    assert fast._executable.compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32


def test_softplus_keeps_the_bits_of_small_results():
    fast = lissom.compile(nn.Softplus(), (normal(2, 3),), backend="openvino")
    x = torch.linspace(-30, 30, 601)[:, None]
    # Some twenty operations of float32, unit roundoff 6e-8; OpenVINO's own operator is off by 0.1 at -12.
    torch.testing.assert_close(fast(x), torch.nn.functional.softplus(x.double()).float(), rtol=2e-6, atol=0)


def test_vision_transformer_equals_the_original():
    case = tiny_vit()
    fast = lissom.compile(case.model, case.inputs, backend="openvino")
    images = {"pixel_values": normal(3, 3, 32, 32, seed=1)}
    with torch.no_grad():
        # Two layers of float32.
        torch.testing.assert_close(fast(**images).logits, case.model(**images).logits, rtol=1e-4, atol=1e-5)


def test_text_of_padding_alone_matches_program(fast_bert):
    case, fast = fast_bert
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    wanted = case.model(input_ids=tokens(), attention_mask=mask).last_hidden_state
    # Two layers of float32; a row that sees nothing is zero in both, not a mean and not a NaN.
    torch.testing.assert_close(fast(input_ids=tokens(), attention_mask=mask).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_computed_in_bfloat16():
    case = feed_forward()
    fast = lissom.compile(case.model.bfloat16(), (normal(2, 5, 8).bfloat16(),), backend="openvino")
    x = normal(3, 4, 8, seed=2).bfloat16()
    # Two products of bfloat16, unit roundoff 4e-3.
    torch.testing.assert_close(fast(x), case.model(x), rtol=2e-2, atol=2e-2)
    assert fast(x).dtype is torch.bfloat16
    assert fast._executable.compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.bf16


def test_inputs_may_lie_in_any_order(built):
    found, network = built
    x = normal(8, 5, 2).transpose(0, 2)
    # As for float32.
    torch.testing.assert_close(network([x])[0], found.program.run([x])[0], rtol=1e-5, atol=1e-6)


def test_results_are_the_callers_to_keep(built):
    _, network = built
    first = network([normal(2, 5, 8)])[0]
    kept = first.clone()
    for seed in range(1, 5):
        network([normal(2, 5, 8, seed=seed)])
    assert torch.equal(first, kept)


def test_eight_threads_get_what_one_gets():
    model = compiled(torch.float32, backend="openvino")
    assert differing_calls(model, torch.float32, threads=8, calls=8) == 0


def test_options_go_with_the_backend():
    allowed = os.sched_getaffinity(0)
    case = feed_forward()
    fast = lissom.compile(case.model, case.inputs, backend=lissom.OpenVino(threads=2))
    assert fast.backend == "openvino"
    assert fast._executable.compiled.get_property("INFERENCE_NUM_THREADS") == 2
    fast(*case.args)
    # Threads are not pinned, those of the caller neither.
    assert os.sched_getaffinity(0) == allowed
    fast = lissom.compile(case.model, case.inputs, backend="openvino")
    assert fast._executable.compiled.get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()


def test_call_that_leads_out_of_table_names_table():
    case = tiny_gpt2()
    fast = lissom.compile(case.model, case.inputs, backend="openvino")
    for row in (1000, -1):
        ids = torch.full((2, 5), row)
        with pytest.raises(InputError, match=rf"the inputs ask for row {row} of 'wte.weight'"):
            fast(input_ids=ids, attention_mask=torch.ones_like(ids))


class Doubling(nn.Module):
    """Twice its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def test_integers_beyond_32_bits_are_refused():
    fast = lissom.compile(Doubling(), torch.tensor([[1, 2]]), backend="openvino")
    assert fast(torch.tensor([[3, -4]])).tolist() == [[6, -8]]
    with pytest.raises(InputError, match="input 'x' holds 2147483648, and OpenVINO computes integers in 32 bits; choose"):
        fast(torch.tensor([[1, 2**31]]))


class Sized(nn.Module):
    """Returns a size with its result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, x.shape[0]


class Solving(nn.Module):
    """Has an operator that ONNX lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve(torch.eye(3) + x[0, 0], x)


class Volume(nn.Module):
    """Has an operator that OpenVINO lacks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(x)


class Total(nn.Module):
    """Adds up its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sum.add_(x.sum(0))
        return x - self.sum


def refusal(program, example) -> str:
    with pytest.raises(UnsupportedError) as caught:
        OpenVino().build(program, example)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_it_cannot_run_is_refused():
    found = capture(Sized(), (normal(2, 3),))
    assert refusal(found.program, found.example).startswith(
        "backend 'openvino' returns tensors, and Sized returns the size 'sym_size"
    )
    double = capture(feed_forward().model.double(), (normal(2, 5, 8).double(),))
    assert refusal(double.program, double.example).startswith(
        "OpenVINO computes float64 in float32 on a CPU, and FeedForward has it in 'x' (placeholder"
    )
    found = capture(nn.Sequential(Volume()), (normal(2, 3, 3),))
    assert refusal(found.program, found.example) == (
        "OpenVINO cannot run Sequential: it has no conversion for Det-23 of ONNX, first in '0/Det'; choose backend 'eager'"
    )
    found = capture(Solving(), (normal(3, 3),))
    assert refusal(found.program, found.example).startswith("OpenVINO cannot run Solving: ")


def test_lowering_for_another_backend_is_refused_with_its_pass():
    case = feed_forward()
    program = lissom.optimize(case.model, case.inputs, passes="pack-linear", checks="structural").program
    found = refusal(program, program.signature.flatten(case.args, case.kwargs))
    assert found.startswith("OpenVINO has no kernel for lissom.packed_linear.default in '")


def test_without_its_packages_it_is_refused_before_anything_runs(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest))
    with pytest.raises(UnsupportedError) as caught:
        lissom.compile(feed_forward().model, ("nothing that could be captured",), backend="openvino")
    assert str(caught.value) == "backend 'openvino' needs openvino; pip install 'lissom[openvino]', or choose backend 'eager'"


def test_the_files_go_with_the_executable():
    found = capture_of("feed_forward")
    network = OpenVino().build(found.program, found.example)
    folder = network.path.parent
    assert sorted(path.name for path in folder.iterdir()) == [BIN, XML]
    del network
    assert not folder.exists()


def test_it_is_saved_and_loaded(tmp_path, fast_bert):
    _, fast = fast_bert
    fast.save(tmp_path / "saved")
    assert {BIN, XML} <= {path.name for path in (tmp_path / "saved").iterdir()}
    again = lissom.load(tmp_path / "saved")
    assert again.backend == "openvino"
    for batch, length in ((2, 5), (3, 7)):
        ids = tokens(batch, length)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(again(**given).last_hidden_state, fast(**given).last_hidden_state)
    other = lissom.load(tmp_path / "saved", backend=lissom.OpenVino(threads=2))
    assert other._executable.compiled.get_property("INFERENCE_NUM_THREADS") == 2
    (tmp_path / "saved" / XML).write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"model.xml' "):
        lissom.load(tmp_path / "saved")


def test_state_is_kept_reset_and_saved(tmp_path):
    fast = lissom.compile(Total(), torch.ones(2, 3), backend="openvino")
    assert fast(torch.ones(4, 3)).tolist() == [[-3.0] * 3] * 4
    assert fast.state()["sum"].tolist() == [4.0] * 3
    fast.save(tmp_path / "saved")
    again = lissom.load(tmp_path / "saved")
    # As at compile time.
    assert again.state()["sum"].tolist() == [0.0] * 3
    fast.state()["sum"].zero_()
    fast(torch.ones(2, 3))
    assert fast.state()["sum"].tolist() == [2.0] * 3
    # A call that fails changes nothing.
    with pytest.raises(RuntimeError):
        fast._executable([torch.ones(2, 4)])
    assert fast.state()["sum"].tolist() == [2.0] * 3


class Rows(nn.Module):
    """Writes rows to places of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(2, 3, 4))

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        self.rows.index_copy_(1, places, x)
        return self.rows.sum()


def test_rows_out_of_range_are_refused_and_leave_the_state():
    fast = lissom.compile(Rows(), (normal(2, 2, 4), torch.tensor([2, 0])), backend="openvino")
    fast(torch.ones(2, 2, 4), torch.tensor([2, 0]))
    wanted = torch.ones(2, 3, 4)
    wanted[:, 1] = 0
    # Of the first of two blocks, a row behind the last is one of the second.
    for places in ([1, 3], [-1, 1], [10**6, 1]):
        with pytest.raises(IndexError, match="an index to copy rows to is out of range; state is left as it was"):
            fast(torch.full((2, 2, 4), 2.0), torch.tensor(places))
        assert torch.equal(fast.state()["rows"], wanted)


def test_decoder_with_cache_gives_the_same_logits():
    model, ids = decoder("llama"), prompt(length=9)["input_ids"]
    fast = lissom.compile_generation(model, max_length=32, backend="openvino", goal=None)
    plain = lissom.compile_generation(model, max_length=32, goal=None)
    for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
        # Two layers of float32.
        torch.testing.assert_close(fast.step(part), plain.step(part), rtol=1e-4, atol=1e-5)


def test_fastest_tries_it(monkeypatch):
    from lissom import backends

    table = {name: backend for name, backend in backends.BACKENDS.items() if name in ("eager", "openvino")}
    monkeypatch.setattr(backends, "BACKENDS", table)
    case = feed_forward()
    fast = lissom.compile(case.model, case.inputs, backend="fastest")
    assert any("openvino " in note and note.startswith("fastest: ") for note in fast.report.history.steps[-1].notes)


INTERRUPTED = """
import gc, os, signal, sys, threading
import torch
import lissom

heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(True))
model, example = torch.nn.Linear(512, 512), torch.randn(64, 512)
found = [lissom.compile(model, example, backend="openvino", goal=None)]
# The last of a network goes in another thread.
thread = threading.Thread(target=lambda: (found.clear(), gc.collect()))
thread.start()
thread.join()
kept = [torch.randn(5000) for _ in range(1000)]
os.kill(os.getpid(), signal.SIGINT)
sys.exit(0 if heard else 1)
"""


def test_a_signal_comes_through_after_the_last_network_is_gone():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-500:]
