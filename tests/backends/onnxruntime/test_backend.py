"""Tests of lissom.backends.onnxruntime.backend: the backend, its options, and what it refuses."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.onnxruntime.backend import CUTTING, OnnxRuntime
from lissom.backends.onnxruntime.session import CPU, CUDA, fallen_back
from lissom.compiler.verify.divergence import relative_error, run_samples, tolerance_of
from lissom.errors import ArtifactError, InputError, UnsupportedError
from lissom.frontends.capture.export import capture
from tests.support.minilm import assert_as_exact_as_pytorch
from tests.support.models import CASES, capture_of, captured, feed_forward, normal, tiny_bert, tiny_gpt2, tiny_llama, tokens


@pytest.fixture(scope="module")
def built():
    """A feed-forward in a session of ONNX Runtime."""
    found = capture_of("feed_forward")
    return found, OnnxRuntime().build(found.program, found.example)


@pytest.fixture(scope="module")
def fast_bert():
    """A tiny encoder, and it compiled."""
    case = tiny_bert()
    return case, lissom.compile(case.model, case.inputs, backend=OnnxRuntime(timing_seconds=0))


SLOW = {"bert_eager", "llama", "llama_eager", "t5", "gpt2", "blocked", "convolution"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_every_model_runs_at_other_sizes(name):
    found = capture_of(name)
    session = OnnxRuntime(timing_seconds=0.01).build(found.program, found.example)
    sample = found.program.signature.resize(found.example, {symbol: 4 for symbol in found.program.signature.dimensions})
    (wanted,) = run_samples(found.program, [sample])
    assert max(map(relative_error, wanted, session(sample))) < tolerance_of(captured(name))


def test_sizes_of_one_run(built):
    found, session = built
    for batch, sequence in [(1, 1), (1, 9), (4, 3)]:
        x = normal(batch, sequence, 8, seed=batch)
        # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
        torch.testing.assert_close(session([x])[0], found.program.run([x])[0], rtol=1e-5, atol=1e-6)


def test_inputs_may_lie_in_any_order(built):
    found, session = built
    x = normal(8, 5, 2).transpose(0, 2)
    # As above.
    torch.testing.assert_close(session([x])[0], found.program.run([x])[0], rtol=1e-5, atol=1e-6)


def test_results_are_the_callers_to_keep(built):
    _, session = built
    first = session([normal(2, 5, 8)])[0]
    kept = first.clone()
    for seed in range(1, 5):
        session([normal(2, 5, 8, seed=seed)])
    assert torch.equal(first, kept)


def test_threads_get_their_own_answers(built):
    _, session = built
    inputs = [normal(2, 3 + seed, 8, seed=seed) for seed in range(4)]
    wanted = [session([x])[0] for x in inputs]
    different = []

    def call(index):
        for _ in range(20):
            if not torch.equal(session([inputs[index]])[0], wanted[index]):
                different.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert different == []


def test_options_go_with_the_backend():
    backend = lissom.OnnxRuntime(providers=(CPU,), threads=1, arena=False, optimization="basic")
    case = feed_forward()
    fast = lissom.compile(case.model, case.inputs, backend=backend)
    assert fast.backend == "onnxruntime"
    options = fast._executable._session.get_session_options()
    assert (options.intra_op_num_threads, options.enable_cpu_mem_arena) == (1, False)
    assert options.graph_optimization_level.name == "ORT_ENABLE_BASIC"
    # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
    torch.testing.assert_close(fast(*case.args), case.model(*case.args), rtol=1e-5, atol=1e-6)


def test_the_structure_is_that_of_the_model(fast_bert):
    case, fast = fast_bert
    found, wanted = fast(**case.inputs), case.model(**case.inputs)
    assert type(found) is type(wanted)
    # Two layers of float32.
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert [
        note.partition(", ")[0] for note in fast.report.history.steps[-1].notes if " without on inputs [2, 5], [2, 5]; " in note
    ] == [
        "attention as one operator",
        "layer norms not fused with the residual adds before them",
        "projections of one input merged into one product",
    ]


def test_text_of_padding_alone_matches_program(fast_bert):
    case, fast = fast_bert
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    wanted = case.model(input_ids=tokens(), attention_mask=mask).last_hidden_state
    # Two layers of float32; a row that sees nothing is zero in both, not a mean and not a NaN.
    torch.testing.assert_close(fast(input_ids=tokens(), attention_mask=mask).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)


def test_call_that_leads_out_of_table_names_table():
    case = tiny_gpt2()
    fast = lissom.compile(case.model, case.inputs, backend=OnnxRuntime(timing_seconds=0))
    for row in (1000, -1):
        ids = torch.full((2, 5), row)
        with pytest.raises(InputError, match=rf"the inputs ask for row {row} of 'wte.weight'"):
            fast(input_ids=ids, attention_mask=torch.ones_like(ids))


class Sized(nn.Module):
    """Returns a size with its result."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x + 1, x.shape[0]


def refusal(program, example, **options) -> str:
    with pytest.raises(UnsupportedError) as caught:
        OnnxRuntime(**options).build(program, example)
    return str(caught.value)


def test_what_it_cannot_run_is_refused():
    found = capture(Sized(), (normal(2, 3),))
    assert refusal(found.program, found.example).startswith(
        "backend 'onnxruntime' returns tensors, and Sized returns the size 'sym_size"
    )
    half = capture(feed_forward().model.bfloat16(), (normal(2, 5, 8).bfloat16(),))
    assert refusal(half.program, half.example).startswith(
        "ONNX Runtime lacks kernels of bfloat16 on a CPU, and FeedForward has it in '"
    )


@pytest.mark.parametrize(
    ("passes", "operator", "named"),
    [
        ("fuse-rotary", "lissom.fused_rotary", "fuse-rotary"),
        ("fuse-attention", "lissom.fused_attention", "fuse-attention or lower-sparse-attention"),
        ("pack-linear", "lissom.packed_linear", "pack-linear or pack-quantized-linear"),
    ],
)
def test_lowering_for_another_backend_is_refused_with_its_pass(passes, operator, named):
    case = tiny_llama()
    program = lissom.optimize(case.model, case.inputs, passes=passes, checks="structural").program
    found = refusal(program, program.signature.flatten((), case.kwargs))
    assert found.startswith(f"ONNX Runtime has no kernel for {operator}")
    assert found.endswith(f"the pass {named} writes for backend 'eager'; leave that pass out, or choose backend 'eager'")


@pytest.mark.parametrize("passes", ["fuse-epilogues", "fuse-merged-attention", "write-state-in-place", "merge-projections"])
@pytest.mark.slow
def test_a_lowering_that_leaves_plain_operators_runs(passes):
    case = tiny_llama()
    backend = OnnxRuntime(timing_seconds=0)
    fast = lissom.compile(case.model, case.inputs, passes=passes, backend=backend, goal=None)
    with torch.no_grad():
        # Two layers of float32.
        assert relative_error(case.model(**case.inputs).logits, fast(**case.inputs).logits) < 1e-5


def test_execution_providers_that_are_not_there_are_refused():
    found = capture_of("feed_forward")
    assert refusal(found.program, found.example, providers=("CPUExecutionProvidr",)).startswith(
        "there is no execution provider 'CPUExecutionProvidr' here; did you mean 'CPUExecutionProvider'? onnxruntime has "
    )
    assert refusal(found.program, found.example, provider_options={CUDA: {"device_id": "1"}}) == (
        "provider_options names 'CUDAExecutionProvider', which is not among the providers CPUExecutionProvider"
    )


def test_nodes_that_fall_back_to_the_cpu_are_told():
    placed = [(CUDA, "MatMul"), (CPU, "Shape"), (CPU, "Gelu"), (CPU, "Gelu"), (CPU, "Softmax")]
    assert fallen_back(placed, CUDA) == (
        "CUDAExecutionProvider does not run all: Gelu (2), Softmax (1) run on the CPU, "
        "and what they read and give crosses the bus"
    )
    assert fallen_back(placed[:2], CUDA) is None
    assert fallen_back(placed, CPU) is None


def test_without_its_packages_it_is_refused_before_anything_runs(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest))
    with pytest.raises(UnsupportedError) as caught:
        lissom.compile(feed_forward().model, ("nothing that could be captured",), backend="onnxruntime")
    assert str(caught.value) == (
        "backend 'onnxruntime' needs onnxruntime; pip install 'lissom[onnx]', or 'lissom[onnx-gpu]' for CUDA, "
        "or choose backend 'eager'"
    )


def test_the_files_go_with_the_executable():
    found = capture_of("feed_forward")
    session = OnnxRuntime(timing_seconds=0).build(found.program, found.example)
    folder = session.path.parent
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    del session
    assert not folder.exists()


def test_it_is_saved_and_loaded(tmp_path, built):
    found, session = built
    OnnxRuntime().save_files(session, tmp_path)
    again = OnnxRuntime().load_executable(found.program, tmp_path)
    assert torch.equal(again(found.example)[0], session(found.example)[0])
    del again
    assert (tmp_path / "model.onnx").is_file()
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"model.onnx is not an ONNX file: DecodeError: "):
        OnnxRuntime().load_executable(found.program, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"elements": "many"}', '{"elements": [2]}', "[" * 100_000])
def test_a_file_of_batches_that_says_nothing_is_refused(tmp_path, built, text):
    found, session = built
    OnnxRuntime().save_files(session, tmp_path)
    (tmp_path / CUTTING).write_text(text)
    with pytest.raises(ArtifactError, match=r"batches.json' does not say in which pieces batches are computed \(.*; compile"):
        OnnxRuntime().load_executable(found.program, tmp_path)


@pytest.mark.slow
def test_minilm_equals_the_original(minilm):
    fast = lissom.compile(minilm.model, minilm.example_inputs, backend="onnxruntime")
    assert_as_exact_as_pytorch(minilm, fast)
    assert Path(fast._executable.path).is_file()
