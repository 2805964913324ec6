"""Tests of lissom.backends.eager.backend."""

import re
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lissom.backends.base import confirm
from lissom.backends.eager.backend import Eager, build_function, emit
from lissom.backends.eager.methods import METHODS
from lissom.compiler.ir.operators import RECURRENT_LAYERS
from lissom.compiler.verify.divergence import run_samples
from lissom.errors import VerifyError
from lissom.frontends.capture.export import capture
from tests.support.models import CASES, capture_of, captured, counter, feed_forward, normal, seeded, tiny_bert

aten = torch.ops.aten

FEED_FORWARD = """\
def run(v0):
    v7 = f6(v0, [8], w0, w1, 1e-05, False)
    v8 = f7(v7, w2, w3)
    del v7
    v9 = f8(v8)
    del v8
    v10 = f9(v9, w4, w5)
    del v9
    v11 = f10(v10, 0.5, False)
    del v10
    v12 = f11(v0, v11)
    del v0, v11
    return (v12, )
"""


@pytest.mark.parametrize("name", CASES)
def test_the_executable_gives_what_the_program_gives(name):
    found = capture_of(name)
    (wanted,) = run_samples(found.program, [found.example])
    built = Eager().build(found.program, found.example)(found.example)
    outputs = wanted[: len(wanted) - len(found.program.state)]
    assert len(built) == len(outputs)
    assert all(same(left, right) for left, right in zip(outputs, built, strict=True))


def same(left: object, right: object) -> bool:
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def test_program_becomes_one_function_with_an_operator_per_line():
    source, _ = emit(captured("feed_forward"))
    assert source == FEED_FORWARD


def test_every_value_is_freed_after_its_last_use():
    source, _ = emit(captured("llama"))
    first, *body, last = source.splitlines()
    made = re.findall(r"v\d+", first + "".join(line.partition("=")[0] for line in body if " = " in line))
    freed = re.findall(r"v\d+", "".join(line for line in body if line.startswith("    del ")))
    assert sorted(freed) == sorted(set(made) - set(re.findall(r"v\d+", last)))


class Alive(TorchDispatchMode):
    """Counts the results of operators that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[weakref.ref] = []
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is aten.sin.default:
            self.results.append(weakref.ref(result))
        self.most = max(self.most, sum(found() is not None for found in self.results))
        return result


class Chain(nn.Module):
    """Twenty operators one after the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(20):
            x = x.sin()
        return x


def test_a_long_chain_holds_two_values_at_once():
    executable = Eager().build(capture(Chain(), (normal(2, 3),)).program, [normal(2, 3)])
    with Alive() as alive:
        executable([normal(2, 3)])
    assert len(alive.results) == 20
    assert alive.most == 2


def test_calls_run_under_inference_mode():
    found = capture_of("feed_forward")
    (result,) = Eager().build(found.program, found.example)(found.example)
    assert result.is_inference()
    assert not result.requires_grad


def test_weights_are_shared_and_not_copied():
    case = feed_forward()
    program = capture(case.model, case.args).program
    _, names = emit(program)
    held = {value.data_ptr() for value in names.values() if isinstance(value, torch.Tensor)}
    assert held == {parameter.data_ptr() for parameter in case.model.parameters()}


def test_state_advances_in_the_executable_alone():
    case = counter()
    program = capture(case.model, case.args).program
    rows = normal(3, 4)
    executable = Eager().build(program, [rows])
    first, second = executable([rows])[0], executable([rows])[0]
    # Adding 3 to values of size 1 rounds to 3e-7.
    torch.testing.assert_close(second - first, torch.full((3, 4), 3.0), rtol=0, atol=1e-6)
    assert program.weight("seen").item() == 0.0
    assert case.model.seen.item() == 0.0


def test_two_executables_of_one_program_have_separate_states():
    program = captured("counter")
    rows = normal(3, 4)
    one, other = Eager().build(program, [rows]), Eager().build(program, [rows])
    first = one([rows])[0]
    one([rows])
    assert torch.equal(other([rows])[0], first)


@pytest.mark.parametrize("name", ["feed_forward", "bert", "llama"])
def test_eight_threads_at_once_give_what_one_gives(name):
    found = capture_of(name)
    executable = Eager().build(found.program, found.example)
    samples = [[tensor.roll(shift, 0) for tensor in found.example] for shift in range(8)]
    wanted = [executable(sample)[0] for sample in samples]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda number: executable(samples[number % 8])[0], range(64)))
    assert all(torch.equal(result, wanted[number % 8]) for number, result in enumerate(results))


class Infinite(nn.Module):
    """Has arguments that have no spelling in Python's source: infinities, dtypes, devices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(x.shape[-1], dtype=torch.bool)
        filled = x.masked_fill(mask, float("-inf")).clamp(max=float("inf"))
        return filled.to(torch.float64)


def test_arguments_without_a_spelling_are_passed_as_they_are():
    model = Infinite()
    executable = Eager().build(capture(model, (normal(2, 3),)).program, [normal(2, 3)])
    assert torch.equal(executable([normal(4, 3)])[0], model(normal(4, 3)))


def test_a_failing_call_shows_the_program_s_name():
    executable = Eager().build(captured("feed_forward"), [normal(2, 5, 8)])
    with pytest.raises(RuntimeError) as caught:
        executable([normal(2, 5, 3)])
    assert any(entry.path == "<lissom program>" for entry in caught.traceback for entry in [entry.frame.code])


@pytest.mark.gpu
def test_a_program_runs_on_a_gpu():
    case = tiny_bert()
    found = capture(case.model, (), case.kwargs, device=torch.device("cuda", 0))
    with torch.no_grad():
        wanted = case.model(**case.kwargs).last_hidden_state
    result = Eager().build(found.program, found.example)(found.example)[0]
    assert result.is_cuda
    # Other kernels sum in another order: float32, unit roundoff 6e-8, sums of at most 24 terms.
    torch.testing.assert_close(result.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_batch_norm_reads_no_channel_that_is_not_there():
    call = METHODS[aten._native_batch_norm_legit_no_training.default]
    x, ones = normal(2, 6, 4), torch.ones(6)
    wanted = aten._native_batch_norm_legit_no_training.default(x, ones, ones, ones, ones, 0.1, 1e-5)
    assert torch.equal(call(x, ones, ones, ones, ones, 0.1, 1e-5)[0], wanted[0])
    with pytest.raises(ValueError, match=r"batch norm has \[2\] for 6 channels"):
        call(x, ones, ones, ones[:2], ones, 0.1, 1e-5)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}])
def test_recurrent_layers_read_no_weight_that_is_not_there(kind, options):
    module = seeded(lambda: kind(3, 4, **options)).eval()
    program = capture(module, (normal(2, 5, 3),)).program
    (node,) = program.nodes(*RECURRENT_LAYERS)
    call = METHODS[node.target]
    states = torch.zeros(*module(normal(2, 5, 3))[1][0].shape) if kind is nn.LSTM else module(normal(2, 5, 3))[1] * 0
    hx = (states, states) if kind is nn.LSTM else states
    rest = node.args[3:]
    wanted = node.target(normal(2, 5, 3), hx, module._flat_weights, *rest)
    assert torch.equal(call(normal(2, 5, 3), hx, module._flat_weights, *rest)[0], wanted[0])
    with pytest.raises(ValueError, match="states and weights of"):
        call(normal(2, 5, 3), hx, [module._flat_weights[0][:1], *module._flat_weights[1:]], *rest)
    with pytest.raises(ValueError, match="of 1000000000 layers has"):
        call(normal(2, 5, 3), hx, module._flat_weights, rest[0], 10**9, *rest[2:])


class Keyword(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (1, 1), mode="reflect")


def test_source_holds_no_text_of_the_program():
    program = capture(Keyword(), (normal(1, 2, 5),)).program
    (call,) = (node for node in program.nodes() if "reflect" in (*node.args, *node.kwargs.values()))
    call.kwargs = {"x=1, **{'a'": None}
    source, names = emit(program)
    assert "reflect" not in source and "'a'" not in source
    assert {"reflect", "x=1, **{'a'"} <= {item for item in names.values() if isinstance(item, str)}
    compile(source, "<test>", "exec")


@pytest.mark.parametrize("name", ["feed_forward", "bert", "counter"])
def test_what_eager_runs_is_compared_with_the_program(name):
    found = capture_of(name)
    run = build_function(found.program)
    assert confirm("eager", run, found.program, found.example) == 0
    with pytest.raises(VerifyError, match=r"what backend 'eager' built from \w+ differs from the program by 0\.\d+ relative"):
        calls = {aten.linear.default: lambda *args: torch.nn.functional.linear(*args) * 1.05}
        confirm("eager", build_function(found.program, calls=lambda node: calls.get(node.target)), found.program, found.example)


def test_memory_that_the_next_call_writes_to_is_refused():
    found = capture_of("feed_forward")
    run, kept = build_function(found.program), {}

    def reuses(inputs):
        (output,) = run(inputs)
        return [kept.setdefault(output.shape, output.clone()).copy_(output)]

    sentence = "gives an output 0 that shares memory with an output of the call before; choose another backend"
    with torch.inference_mode(), pytest.raises(VerifyError, match=sentence):
        confirm("eager", reuses, found.program, found.example)
