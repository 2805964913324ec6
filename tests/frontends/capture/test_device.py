"""Tests of lissom.frontends.capture.device: a program on another device, the meta device where there is no other."""

import pytest
import torch
from torch import nn

from lissom.compiler.ir import node as nodes
from lissom.compiler.verify.structure import verify_structure
from lissom.frontends.capture.device import device_of, move
from lissom.frontends.capture.export import capture
from tests.support.models import captured, normal, tiny_bert

META = torch.device("meta")


def test_a_model_is_where_its_first_weight_is():
    assert device_of(nn.Linear(2, 3, device="meta"), torch.ones(2)) == META


def test_a_model_without_weights_is_where_its_inputs_are():
    assert device_of(nn.ReLU(), {"x": torch.ones(2, device="meta")}) == META
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_a_program_that_is_there_already_is_left_alone():
    program = captured("feed_forward")
    assert move(program, torch.device("cpu")) is program


@pytest.mark.parametrize("name", ["feed_forward", "counter", "bert", "t5"])
def test_weights_types_and_signature_move(name):
    program = captured(name)
    moved = move(program, META)
    assert {weight.device for weight in moved.weights().values()} == {META}
    assert {leaf.type.device for leaf in moved.signature.tensors} == {META}
    assert {nodes.tensor_type(node).device for node in moved if nodes.is_tensor(node)} == {META}
    verify_structure(moved)


def test_the_program_that_was_moved_stays():
    program = captured("bert")
    text, weights = program.text(), program.weights()
    move(program, META)
    assert program.text() == text
    assert all(program.weight(name) is weight for name, weight in weights.items())
    verify_structure(program)


def test_devices_written_into_operators_move():
    assert "device=cpu" in captured("llama").text()
    text = move(captured("llama"), META).text()
    assert "device=meta" in text
    assert "device=cpu" not in text


def test_a_moved_program_says_where_it_is():
    assert move(captured("tied"), META).signature.describe() == "(tokens: i64[batch, sequence]@meta)"


def test_trainable_weights_stay_trainable_and_names_stay():
    program = captured("feed_forward")
    moved = move(program, META)
    assert list(moved.weights()) == list(program.weights())
    assert all(isinstance(weight, nn.Parameter) for weight in moved.weights().values())


def test_a_moved_program_runs_where_it_is():
    moved = move(captured("feed_forward"), META)
    assert moved(normal(3, 4, 8).to(META)).shape == (3, 4, 8)


@pytest.mark.gpu
def test_a_program_moved_to_a_gpu_gives_the_same():
    case = tiny_bert()
    found = capture(case.model, (), case.kwargs, device=torch.device("cuda", 0))
    with torch.no_grad():
        wanted = case.model(**case.kwargs).last_hidden_state
        moved = found.program(**{name: tensor.cuda() for name, tensor in case.kwargs.items()}).last_hidden_state.cpu()
    assert all(tensor.is_cuda for tensor in found.example)
    # Other kernels sum in another order, and TF32 is off by default: float32, unit roundoff 6e-8, sums of at most 24 terms.
    torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-5)
