"""Tests of state: what backends keep from call to call, read, put back, shared between input and output, and saved."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import lissom
from lissom.backends.base import confirm, restored_state, state_of
from lissom.backends.eager.backend import Eager
from lissom.backends.onnxruntime.backend import OnnxRuntime
from lissom.backends.openvino.backend import OpenVino
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import VerifyError
from lissom.frontends.capture.export import capture
from tests.support import captures
from tests.support.caches import DYNAMIC, PLACES, Decoder, call_of, decoder, decoder_session, generation
from tests.support.models import capture_of, counter, normal, seeded
from tests.support.neighbours import all_but_slow

BACKENDS = {"eager": Eager(), "onnxruntime": OnnxRuntime(timing_seconds=0)}
# Two layers of float32 (unit roundoff 6e-8), sums of at most 64 terms in another order.
TOLERANCE = 1e-5


WITH_OPENVINO = pytest.mark.skipif(OpenVino().missing() is not None, reason=str(OpenVino().missing()))


@pytest.fixture(scope="module", params=[*BACKENDS, pytest.param("openvino", marks=WITH_OPENVINO)])
def built(request):
    """A decoder, and what runs it."""
    found, backend = decoder(), {**BACKENDS, "openvino": OpenVino()}[request.param]
    return found, decoder_session() if request.param == "onnxruntime" else backend.build(found.program, found.example)


@pytest.fixture
def fresh(built):
    """The same, with its state put back afterwards."""
    with restored_state(built[1]):
        yield built


def errors(wanted, found, calls) -> float:
    """The worst relative error of results and state over calls one after the other."""
    worst = 0.0
    for sample in calls:
        pairs = [*zip(wanted(sample), found(sample), strict=True)]
        pairs += zip(state_of(wanted).values(), state_of(found).values(), strict=True)
        worst = max(worst, *(relative_error(left, right) for left, right in pairs))
    return worst


OTHERS = [(True, 2), (False, 1), (False, 2)]


@pytest.mark.parametrize(("consecutive", "batch"), all_but_slow([(True, 1), *OTHERS], *OTHERS))
def test_prompt_and_tokens_behind_it_are_as_on_eager(consecutive, batch):
    found, fast = decoder(batch, consecutive=consecutive), decoder_session(batch, consecutive)
    with restored_state(fast):
        eager = BACKENDS["eager"].build(found.program, found.example)
        assert errors(eager, fast, generation(batch, consecutive=consecutive)) < TOLERANCE


def test_it_starts_where_program_is_and_leaves_that_alone(built):
    found, executable = built
    assert list(state_of(executable)) == list(found.program.state)
    for name, tensor in state_of(executable).items():
        assert torch.equal(tensor, found.program.weight(name))
        assert tensor.data_ptr() != found.program.weight(name).data_ptr()


def test_state_is_read_and_reset(fresh):
    _, executable = fresh
    first = executable(call_of(0, 4))[0].clone()
    kept = {name: tensor.clone() for name, tensor in state_of(executable).items()}
    assert all(tensor[:, :, :4].any() and not tensor[:, :, 4:].any() for tensor in kept.values())
    wanted = executable(call_of(4, 1))[0].clone()
    for name, tensor in state_of(executable).items():
        tensor.copy_(kept[name])
    assert torch.equal(executable(call_of(4, 1))[0], wanted)
    for tensor in state_of(executable).values():
        tensor.zero_()
    assert torch.equal(executable(call_of(0, 4))[0], first)


def test_rows_of_state_may_change_places(fresh):
    _, executable = fresh
    prompt, token = call_of(0, 4, padding=0), call_of(4, 1, padding=0)
    executable(prompt)
    wanted = executable(token)[0].clone()
    for tensor in state_of(executable).values():
        tensor.copy_(tensor[[1, 0]])
    found = executable([token[0][[1, 0]], *token[1:]])[0]
    # The same sums in the same order, in other rows.
    torch.testing.assert_close(found[[1, 0]], wanted, rtol=1e-5, atol=1e-6)


def test_checking_what_was_built_leaves_its_state(fresh):
    found, executable = fresh
    executable(call_of(0, 4))
    kept = {name: tensor.clone() for name, tensor in state_of(executable).items()}
    with pytest.raises(VerifyError, match="differs from the program"):
        confirm("it", executable, found.program, found.example)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state_of(executable).items())


def test_calls_outside_the_cache_are_refused(built):
    for start in (PLACES - 1, -1):
        sample = call_of(0, 2)
        sample[3] = torch.tensor([start])
        with pytest.raises((RuntimeError, IndexError)):
            built[1](sample)


def test_what_has_no_state_says_so():
    found = capture_of("feed_forward")
    for backend in BACKENDS.values():
        assert state_of(backend.build(found.program, found.example)) == {}


def test_cache_is_one_memory_before_and_after_call():
    fast = decoder_session()
    places = {name: tensor.data_ptr() for name, tensor in fast.state().items()}
    for memory in fast._memories.values():
        assert memory.now.data_ptr() == memory.next.data_ptr()
    with restored_state(fast):
        for sample in generation()[:3]:
            fast(sample)
            assert {name: tensor.data_ptr() for name, tensor in fast.state().items()} == places
    names = [item.name for item in onnx.load(fast.path, load_external_data=False).graph.input]
    assert names[:5] == ["input_ids", "attention_mask", "position_ids", "start", "past_layers_0_keys"]


def test_unknown_in_place_writes_get_two_buffers():
    found = capture_of("counter")
    fast = BACKENDS["onnxruntime"].build(found.program, found.example)
    first = fast.state()["seen"]
    for count in (3.0, 6.0, 9.0):
        fast([normal(3, 4)])
        assert fast.state()["seen"].item() == count
    assert fast.state()["seen"].data_ptr() != first.data_ptr()


class Returning(nn.Module):
    """Returns its state as it was and as it is then."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(2, 3))

    def forward(self, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        old = self.last.clone()
        self.last.index_copy_(0, rows, x)
        return old, self.last.clone()


def test_state_may_be_returned_before_it_is_written():
    inputs = (normal(1, 3), torch.tensor([1]))
    eager, fast = (lissom.compile(seeded(Returning), inputs, backend=backend) for backend in BACKENDS.values())
    for seed in range(3):
        sample = [normal(1, 3, seed=seed), torch.tensor([seed % 2])]
        assert all(map(torch.equal, eager(*sample), fast(*sample)))
        assert all(map(torch.equal, eager.state().values(), fast.state().values()))


class Copied(nn.Module):
    """Copies rows to given places of its input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor, places: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return x.index_copy(self.dim, places, rows)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_rows_are_copied_along_any_dimension(dim):
    shape = [3, 4, 5]
    shape[dim] = 2
    sample = [normal(3, 4, 5), torch.tensor([2, 0]), normal(*shape, seed=1)]
    found = capture(Copied(dim), sample, dynamic={"x": {0: "batch"}, "rows": {0: "batch"}} if dim not in (0, -3) else False)
    fast = BACKENDS["onnxruntime"].build(found.program, found.example)
    assert torch.equal(fast(sample)[0], sample[0].index_copy(dim, *sample[1:]))
    for place in (-1, 5):
        with pytest.raises(RuntimeError, match="indice"):
            fast([sample[0], torch.tensor([place, 0]), sample[2]])


def test_a_compiled_model_gives_its_state():
    case = counter()
    for backend in BACKENDS.values():
        fast = lissom.compile(case.model, case.inputs, backend=backend)
        fast(*case.args)
        assert fast.state()["seen"].item() == 3.0
        fast.state()["seen"].zero_()
        # Adding 3 to values of size 1 rounds to 3e-7.
        torch.testing.assert_close(fast(*case.args), case.model.linear(*case.args) + 3, rtol=0, atol=1e-6)


def test_backends_are_timed_without_leaving_a_trace():
    case = counter()
    fast = lissom.compile(case.model, case.inputs, backend="fastest")
    assert fast.state()["seen"].item() == 0.0


PLAIN, INT4 = "", "quantize{scheme=int4-weight,skip=embedding}"


@pytest.fixture(scope="module", params=[PLAIN, INT4], ids=["float32", "int4-weight"])
def compiled(request):
    """A decoder compiled by ONNX Runtime, and the same by eager with its weights rounded."""
    model, example = seeded(lambda: Decoder()), tuple(call_of(2, 5))
    return [
        captures.compile(model, example, passes=request.param, backend=backend, dynamic=DYNAMIC, goal=None)
        for backend in BACKENDS.values()
    ]


@pytest.mark.parametrize("compiled", all_but_slow([PLAIN, INT4], PLAIN), ids=["float32", "int4-weight"], indirect=True)
def test_weights_of_few_bits_go_with_state(compiled):
    eager, fast = compiled
    with restored_state(eager._executable, fast._executable):
        assert errors(eager._executable, fast._executable, generation()) < TOLERANCE
    operators = [node.op_type for node in onnx.load(fast._executable.path, load_external_data=False).graph.node]
    quantized = "int4" in fast.report.history.pipeline
    # Six projections in each of two layers.
    assert (operators.count("MatMulNBits"), fast._executable.quantized) == ((12, 12) if quantized else (0, 0))


def test_it_is_saved_as_it_was_compiled_and_loaded(compiled, tmp_path):
    fast = compiled[1]
    with restored_state(fast._executable):
        wanted = [fast(*sample).clone() for sample in generation()[:4]]
        fast.save(tmp_path / "model")
    again = lissom.load(tmp_path / "model")
    assert all(torch.equal(tensor, again.program.weight(name)) for name, tensor in again.state().items())
    assert all(memory.now is memory.next for memory in again._executable._memories.values())
    for result, sample in zip(wanted, generation()[:4], strict=True):
        assert torch.equal(again(*sample), result)
