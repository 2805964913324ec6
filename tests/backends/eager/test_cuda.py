"""Tests of lissom.backends.eager.cuda_graphs: on the CPU what is decided, on a GPU what is recorded and replayed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from lissom.backends.eager import cuda_graphs
from lissom.backends.eager.backend import Eager
from lissom.backends.eager.cuda_graphs import CudaGraphs, obstacle, with_fast_layout, with_graphs
from lissom.frontends.capture.export import capture
from lissom.ops import block_sparse_attention
from lissom.ops.pattern import LAYOUT, Pattern
from tests.support.models import CASES, captured, normal, seeded, tiny_llama


@pytest.mark.parametrize("name", [name for name in CASES if name != "counter"])
def test_nothing_stands_against_recording_a_transformer(name):
    assert obstacle(captured(name)) is None


def test_state_stands_against_recording():
    assert obstacle(captured("counter")) == "the program writes to 'seen'"


class Selects(nn.Module):
    """Picks rows by flags, so that the size of its result depends on their values."""

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return x[keep] * 2


class Gathers(nn.Module):
    """Picks rows by number."""

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x[rows] * 2


def test_a_size_that_depends_on_values_stands_against_recording():
    program = capture(Selects(), (normal(4, 3), torch.tensor([True, False, True, True])), dynamic=False).program
    assert (obstacle(program) or "").endswith(" depends on values, which the host would have to wait for")


def test_picking_rows_by_number_does_not():
    assert obstacle(capture(Gathers(), (normal(4, 3), torch.tensor([0, 2])), dynamic=False).program) is None


class Sparse(nn.Module):
    """Attention under a layout, which is a weight or computed from an input."""

    def __init__(self, computed: bool) -> None:
        super().__init__()
        self.computed = computed
        self.register_buffer("layout", torch.eye(3, dtype=torch.bool)[None])

    def forward(self, x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        layout = blocks > 0 if self.computed else self.layout
        return (
            block_sparse_attention(x, x, x, None, layout, pattern=Pattern(((LAYOUT,),)).encode(), block=8, scale=0.5)
            + blocks.sum()
        )


def test_a_layout_that_is_computed_stands_against_recording():
    inputs = (normal(1, 2, 24, 16), normal(1, 3, 3))
    assert obstacle(capture(Sparse(False), inputs, dynamic=False).program) is None
    found = obstacle(capture(Sparse(True), inputs, dynamic=False).program)
    assert (found or "").endswith("has a layout that is computed, and the host reads it")


def test_programs_on_the_cpu_are_left_alone():
    program = captured("feed_forward")
    assert with_fast_layout(program) is program
    assert with_graphs(program, program.run) == program.run


def on_gpu(name: str):
    case = CASES[name]()
    return capture(case.model, case.args, case.kwargs, device=torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_replays_give_what_the_program_gives(name):
    found = on_gpu(name)
    executable = Eager().build(found.program, found.example)
    graphs = executable._function if found.program.state else executable  # pyright: ignore[reportFunctionMemberAccess]
    assert isinstance(graphs, CudaGraphs)
    samples = [found.example, [tensor.flip(0) for tensor in found.example]]
    plain, recorded, replayed = (executable(samples[index])[0] for index in (0, 0, 1))
    if not found.program.state:
        with torch.no_grad():
            wanted = [found.program.run(sample)[0] for sample in samples]
        # The same kernels on the same numbers, but libraries may choose others when warm: float32, unit roundoff 6e-8.
        torch.testing.assert_close(plain, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(recorded, wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(replayed, wanted[1], rtol=1e-5, atol=1e-5)
    assert len(graphs._graphs) == (0 if found.program.state else 1)


@pytest.mark.gpu
def test_results_are_the_caller_s():
    found = on_gpu("feed_forward")
    executable = Eager().build(found.program, found.example)
    first = [executable(found.example)[0] for _ in range(3)][-1]
    kept = first.clone()
    executable([tensor * 2 for tensor in found.example])
    assert torch.equal(first, kept)


@pytest.mark.gpu
def test_graphs_are_bounded(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPHS", 2)
    found = on_gpu("feed_forward")
    executable = Eager().build(found.program, found.example)
    for length in (3, 4, 5, 3):
        x = normal(2, length, 8).cuda()
        results = [executable([x])[0] for _ in range(3)]
        assert all(torch.equal(result, results[-1]) for result in results[1:])
    assert len(executable._graphs) == 2


@pytest.mark.gpu
def test_threads_and_streams_get_their_own_answers():
    found = on_gpu("llama")
    executable = Eager().build(found.program, found.example)
    samples = [[tensor.roll(shift, 0) for tensor in found.example] for shift in range(2)]
    wanted = [executable(sample)[0].clone() for sample in samples]

    def call(number):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            result = executable(samples[number % 2])[0]
        stream.synchronize()
        return result

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(call, range(64)))
    for number, result in enumerate(results):
        # Libraries may choose other kernels when warm: float32, unit roundoff 6e-8.
        torch.testing.assert_close(result, wanted[number % 2], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_call_does_not_wait_for_the_device():
    found = on_gpu("llama")
    executable = Eager().build(found.program, found.example)
    for _ in range(3):
        executable(found.example)
    torch.cuda.set_sync_debug_mode("error")
    try:
        executable(found.example)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_value_dependent_program_runs_plainly_and_says_so():
    keep = torch.tensor([True, False, True, True])
    found = capture(Selects(), (normal(4, 3), keep), dynamic=False, device=torch.device("cuda", 0))
    executable = Eager().build(found.program, found.example)
    assert [len(executable(found.example)[0]) for _ in range(3)] == [3, 3, 3]
    assert executable.notes[0].startswith("no CUDA graphs: ")


@pytest.mark.gpu
def test_weights_are_laid_out_once_and_model_s_stay():
    model = seeded(lambda: nn.Conv2d(3, 8, 2))
    found = capture(model.cuda(), (normal(2, 3, 4, 4).cuda(),))
    placed = with_fast_layout(found.program)
    assert placed.weight("weight").is_contiguous(memory_format=torch.channels_last)
    assert model.weight.is_contiguous()
    # Sums of 12 terms of float32, which convolutions on a GPU take in TF32: unit roundoff 5e-4.
    torch.testing.assert_close(placed.run(found.example)[0], found.program.run(found.example)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_size_never_seen_again_is_not_recorded():
    case = tiny_llama()
    found = capture(case.model, (), case.kwargs, device=torch.device("cuda", 0))
    executable = Eager().build(found.program, found.example)
    for size in range(2, 6):
        sizes = {symbol: size for symbol in found.program.signature.dimensions}
        executable(found.program.signature.resize(found.example, sizes))
    assert not executable._graphs
