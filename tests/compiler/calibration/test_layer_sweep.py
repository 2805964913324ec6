"""Tests of lissom.compiler.calibration.layer_sweep, against the program run again from the start after every change."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import fx, nn

import lissom
from lissom.compiler.analysis.structure.linear import input_of, is_linear, weight_of
from lissom.compiler.analysis.structure.matrix import Matrix, matrix_of
from lissom.compiler.calibration.layer_sweep import Counterpart, sweep, sweep_moments
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from tests.support import captures
from tests.support.mixtures import MIXTURES, program_of, samples, stacked_products
from tests.support.models import captured, normal, seeded, tiny_gpt2, tokens


def gpt2() -> tuple[Program, list[Sample]]:
    """GPT-2, and three samples of which two end in padding."""
    case = tiny_gpt2()
    program = captures.optimize(case.model, case.inputs).program
    masks = [torch.ones(2, 5, dtype=torch.long) for _ in range(3)]
    masks[1][0, 3:] = masks[2][1, 2:] = 0
    given = [{"input_ids": tokens(seed=seed), "attention_mask": mask} for seed, mask in enumerate(masks)]
    return program, [program.signature.flatten((), inputs) for inputs in given]


def values_of(program: Program, sample: Sample, wanted: object) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        program.run(sample, lambda node, value: seen.append(value) if node is wanted else None)  # pyright: ignore
    return seen[0]


def weight_name(layer: fx.Node) -> str:
    return next(str(item.target) for item in layer.all_input_nodes if "weight" in str(item.target))


def test_every_layer_gets_its_input_in_changed_program():
    program, data = gpt2()
    layers = [node for node in program.nodes() if is_linear(node)]
    at = [leaf.path for leaf in program.signature.tensors].index("attention_mask")
    seen = []
    for layer, read in sweep(program, data, layers):
        seen.append(layer)
        for sample, rows in zip(data, read, strict=True):
            value = values_of(program, sample, input_of(layer))
            torch.testing.assert_close(rows, value.reshape(-1, value.shape[-1])[sample[at].flatten() != 0])
        name = weight_name(layer)
        program.set_weight(name, program.weight(name).detach() * 0.5)
    assert seen == layers


class Turned(nn.Module):
    """Its weight is turned round before what it multiplies is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.second = nn.Parameter(normal(4, 6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = self.weight.t().t()
        return self.second(torch.relu(x) @ turned) * 2


def test_views_of_weight_are_made_after_it_was_set():
    module = seeded(Turned)
    program = lissom.frontends.capture.export.capture(module, (normal(5, 4),), {}).program
    layers = [node for node in program.nodes() if is_linear(node)]
    assert len(layers) == 2
    x = normal(7, 4, seed=1)
    for layer, read in sweep(program, [[x]], layers):
        if layer is layers[0]:
            torch.testing.assert_close(read[0], torch.relu(x))
            program.set_weight("weight", torch.ones(4, 6))
        else:
            torch.testing.assert_close(read[0], torch.relu(x) @ torch.ones(4, 6))


def test_state_is_left_as_it_is():
    program = captured("counter")
    layers = [node for node in program.nodes() if is_linear(node)]
    assert len(list(sweep(program, [[normal(3, 4)], [normal(2, 4)]], layers))) == 1
    assert float(program.weight("seen")) == 0


def test_moments_of_both_programs_with_tokens_weighted():
    """The oracle runs both programs from the start: Σ w x·xᵀ and Σ w (x₀ - x)·xᵀ, padding left out."""
    other, data = gpt2()
    program = other.copy()
    layers = {
        node: name for node in program.nodes() if is_linear(node) and (name := weight_name(node)).endswith("c_proj.weight")
    }
    assert len(layers) == 4
    known = {node.name: node for node in other.nodes()}
    at = [leaf.path for leaf in program.signature.tensors].index("attention_mask")
    weighted = list(layers)[1]

    def token_weights(layer: fx.Node, read: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        return [rows.square().mean(-1) for rows in read] if layer is weighted else None

    counterpart = Counterpart(other, {layer: known[layer.name] for layer in list(layers)[:3]})
    for layer, read in sweep_moments(program, data, layers, token_weights=token_weights, counterpart=counterpart):
        gram, shift = torch.zeros(()), torch.zeros(())
        for sample in data:
            real = sample[at].flatten() != 0
            x, before = (
                values_of(item, sample, input_of(node)).flatten(0, -2)[real]
                for item, node in ((program, layer), (other, known[layer.name]))
            )
            weights = x.square().mean(-1, keepdim=True) if layer is weighted else 1.0
            gram = gram + (weights * x).T @ x
            shift = shift + (before - x).T @ (weights * x)
        torch.testing.assert_close(read.moments.gram, gram)
        if layer.name not in {item.name for item in counterpart.layers}:
            assert read.shift is None
        else:
            torch.testing.assert_close(read.shift, shift)
        program.set_weight(layers[layer], program.weight(layers[layer]).detach() * 0.5)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_has_the_moments_of_its_rows(name: str) -> None:
    program = program_of(name)
    data = [program.signature.flatten((), inputs) for inputs in samples(3, length=3)]
    layers = stacked_products(program)
    for layer, read in sweep_moments(program, data, {node: str(weight_of(node).target) for node in layers}):
        values = [[values_of(program, sample, node) for node in (input_of(layer), layer.args[2])] for sample in data]
        for expert, found in enumerate(read.each):
            starts = [0 if expert == 0 else int(ends[expert - 1]) for _, ends in values]
            rows = torch.cat([rows[start : int(ends[expert])] for start, (rows, ends) in zip(starts, values, strict=True)])
            assert found.count == len(rows)
            torch.testing.assert_close(found.gram, rows.T @ rows)
        assert read.moments.count == sum(len(rows) for rows, _ in values) == sum(item.count for item in read.each)


def test_experts_that_share_a_stack_add_their_moments() -> None:
    program = program_of("mixtral")
    data = [program.signature.flatten((), inputs) for inputs in samples(2)]
    layer = stacked_products(program)[0]
    name = str(weight_of(layer).target)
    ((_, alone),) = sweep_moments(program, data, {layer: name})
    ((_, first),) = sweep_moments(program, data, {layer: name}, [name])
    for one, other in zip(alone.each, first.each, strict=True):
        assert one.count == other.count
        torch.testing.assert_close(one.gram, other.gram)


def test_experts_have_no_counterpart() -> None:
    program = program_of("mixtral")
    layers = {
        node: matrix
        for node in program.nodes()
        if is_linear(node) and isinstance(matrix := matrix_of(node, stacks=True), Matrix)
    }
    found = Counterpart.of(program, layers, program).layers
    assert stacked_products(program) == [node for node in layers if node not in found]
