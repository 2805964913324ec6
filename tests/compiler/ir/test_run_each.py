"""Tests of Program.run_each: several samples call by call, which give what each gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

import lissom
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program, kept_state
from lissom.compiler.ir.samples import Sample
from lissom.compiler.verify import divergence
from lissom.compiler.verify.divergence import run_samples
from lissom.compiler.verify.equality import require_equal
from lissom.errors import VerifyError
from lissom.frontends.generation.decoder import capture_decoder
from lissom.ops.quantization import fake_quantize
from tests.support.models import seeded, tiny_bert


@pytest.fixture(scope="module")
def decoder() -> tuple[Program, list[Sample]]:
    """A program with a KV cache, and calls of several sizes."""
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    captured = capture_decoder(seeded(lambda: LlamaForCausalLM(config)), max_length=16)
    program = captured.program
    for tensor in program.state_tensors():
        tensor.normal_()
    return program, [*captured.samples, *captured.timed]


def alone(program: Program, samples: list[Sample]) -> list[list[object]]:
    """The outputs and the new state of each sample by itself."""
    return [run_samples(program, [sample])[0] for sample in samples]


def test_outputs_and_state_are_those_of_each_sample_alone(decoder: tuple[Program, list[Sample]]) -> None:
    program, samples = decoder
    before, wanted = program.state_values(), alone(program, samples)
    with torch.no_grad(), kept_state(program):
        actual = program.run_each(samples)
    assert len(samples) > 2
    for left, right in zip(wanted, actual, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, torch.Tensor))
    assert all(torch.equal(a, b) for a, b in zip(before, program.state_values(), strict=True))


def test_value_that_is_replaced_for_one_sample_is_so_for_it_alone(decoder: tuple[Program, list[Sample]]) -> None:
    program, samples = decoder
    first = program.nodes(torch.ops.aten.embedding.default)[0]

    def zero(index: int, node: fx.Node, value: object) -> object:
        return torch.zeros_like(value) if node is first and index == 1 and isinstance(value, torch.Tensor) else None

    wanted = alone(program, samples)
    with torch.no_grad(), kept_state(program):
        actual = program.run_each(samples, zero)
    same = [bool(torch.equal(left[0], right[0])) for left, right in zip(wanted, actual, strict=True)]
    assert same == [index != 1 for index in range(len(samples))]


def test_what_depends_on_weights_alone_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bert = tiny_bert()
    program = lissom.optimize(bert.model, bert.inputs, passes="quantize{scheme=int8-weight}", checks="off").program
    sample, calls = program.signature.flatten((), bert.inputs), list[str]()
    weights = program.nodes(fake_quantize)

    def count(index: int, node: fx.Node, value: object) -> None:
        calls.extend([f"{node.name} {id(value)}"] if node in weights else [])

    with torch.no_grad():
        program.run_each([sample, sample, sample], count)
    assert len(weights) > 2
    assert len(set(calls)) == len(weights) and len(calls) == 3 * len(weights)


@pytest.mark.parametrize("together", [True, False])
def test_samples_of_a_large_program_run_together(
    decoder: tuple[Program, list[Sample]], monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    program, samples = decoder
    monkeypatch.setattr(divergence, "_MUCH", 0 if together else 1 << 40)
    ways = list[int]()
    run_each = Program.run_each
    monkeypatch.setattr(
        Program, "run_each", lambda self, given, *rest: (ways.append(len(given)), run_each(self, given, *rest))[1]
    )
    outputs = run_samples(program, samples)
    assert ways == ([len(samples)] if together else [])
    for left, right in zip(outputs, alone(program, samples), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True) if isinstance(a, torch.Tensor))


def test_samples_with_a_large_state_run_in_groups(
    decoder: tuple[Program, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state follows the first sample's outputs alone."""
    program, samples = decoder
    wanted = alone(program, samples)
    monkeypatch.setattr(divergence, "_MUCH", 0)
    monkeypatch.setattr(divergence, "_HELD_STATE", 2 * sum(tensor.nbytes for tensor in program.state_tensors()))
    monkeypatch.setattr(divergence, "_LARGE_STATE", 0)
    seen = list[int]()
    outputs = run_samples(program, samples, lambda index, node, value: seen.append(index))
    assert [len(group) for group in divergence.groups(program, samples)[:-1]] == [2] * ((len(samples) - 1) // 2)
    assert sorted(set(seen)) == [*range(len(samples))]
    assert [len(row) for row in outputs] == [len(wanted[0]), *[len(program.leaves)] * (len(samples) - 1)]
    for left, right in zip(wanted, outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=False) if isinstance(a, torch.Tensor))


def test_a_wrong_write_to_a_large_state_is_found(
    decoder: tuple[Program, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, samples = decoder
    monkeypatch.setattr(divergence, "_LARGE_STATE", 0)
    after = program.copy()
    write = next(node for node in reversed(after.nodes()) if nodes.is_state_write(node))
    with after.graph.inserting_after(write):
        zeroed = after.graph.call_function(torch.ops.aten.mul_.Scalar, (write.args[0], 0.0))
    zeroed.meta.update(write.meta)
    wanted, actual = run_samples(program, samples), run_samples(after, samples)
    with pytest.raises(VerifyError):
        require_equal(program, after, samples, wanted, actual)
