"""Tests of lissom.compiler.sweep, with the program run again from the start after every change as the oracle."""

from __future__ import annotations

import torch
from torch import nn

import lissom
from lissom.compiler.linears import input_of, is_linear
from lissom.compiler.program import Program
from lissom.compiler.samples import Sample
from lissom.compiler.sweep import sweep
from tests.models import captured, normal, seeded, tiny_gpt2, tokens


def gpt2() -> tuple[Program, list[Sample]]:
    """GPT-2, and three samples of which two end in padding."""
    case = tiny_gpt2()
    program = lissom.optimize(case.model, case.inputs).program
    masks = [torch.ones(2, 5, dtype=torch.long) for _ in range(3)]
    masks[1][0, 3:] = masks[2][1, 2:] = 0
    given = [{"input_ids": tokens(seed=seed), "attention_mask": mask} for seed, mask in enumerate(masks)]
    return program, [program.signature.flatten((), inputs) for inputs in given]


def values_of(program: Program, sample: Sample, wanted: object) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        program.run(sample, lambda node, value: seen.append(value) if node is wanted else None)  # pyright: ignore
    return seen[0]


def test_every_layer_is_given_what_it_reads_in_the_program_as_it_was_changed():
    program, data = gpt2()
    layers = [node for node in program.nodes() if is_linear(node)]
    at = [leaf.path for leaf in program.signature.tensors].index("attention_mask")
    seen = []
    for layer, read in sweep(program, data, layers):
        seen.append(layer)
        for sample, rows in zip(data, read, strict=True):
            value = values_of(program, sample, input_of(layer))
            torch.testing.assert_close(rows, value.reshape(-1, value.shape[-1])[sample[at].flatten() != 0])
        name = next(str(item.target) for item in layer.all_input_nodes if "weight" in str(item.target))
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


def test_views_of_a_weight_are_made_after_it_was_set():
    module = seeded(Turned)
    program = lissom.frontends.export.capture(module, (normal(5, 4),), {}).program
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
