"""Tests of lissom.compiler.calibration.statistics, with the models themselves run by hand as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.real_tokens import token_mask
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.calibration.statistics import Moments, moments, observe_gradients, real_rows
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.errors import RequirementError
from tests.support import captures
from tests.support.models import normal, tiny_bert


def bert() -> tuple[Program, list[Sample], torch.nn.Module]:
    """A BERT, and two batches of which the second ends in padding."""
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs).program
    first = program.signature.flatten((), case.kwargs)
    second = [tensor.clone() for tensor in first]
    names = [leaf.path for leaf in program.signature.tensors]
    second[names.index("attention_mask")][:, -2:] = 0
    return program, [first, second], case.model


def test_moments_are_those_of_the_values_at_real_tokens() -> None:
    program, data, model = bert()
    down = program.fact(structure).feed_forward[0].down
    found = moments(program, data, [input_of(down)])[input_of(down)]
    rows: list[torch.Tensor] = []
    mask_at = [leaf.path for leaf in program.signature.tensors].index("attention_mask")
    layer = model.encoder.layer[0].intermediate
    masks = iter([data[0][mask_at] != 0, data[1][mask_at] != 0])
    layer.register_forward_hook(lambda module, args, result: rows.append(result[next(masks)]))
    with torch.no_grad():
        for sample in data:
            model(**dict(zip([leaf.path for leaf in program.signature.tensors], sample, strict=True)))
    wanted = torch.cat(rows).double()
    assert found.count == len(wanted) == int(sum((sample[mask_at] != 0).sum() for sample in data))
    # Sums of a few dozen products in float32.
    torch.testing.assert_close(found.gram.double(), wanted.T @ wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total.double(), wanted.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.norms.double(), wanted.norm(dim=0), rtol=1e-5, atol=1e-5)


def test_moments_add_up() -> None:
    rows = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    together, apart = Moments.empty(4), Moments.empty(4)
    together.add(rows)
    apart.add(rows[:5])
    apart.add(rows[5:])
    torch.testing.assert_close(together.gram, apart.gram)
    assert together.count == apart.count == 9


def test_a_flat_value_has_a_flat_mask() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.layer(x.flatten(0, 1)).tanh() * mask.flatten()[:, None]

    inputs = (normal(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    program = captures.optimize(Flat().eval(), inputs).program
    linear = program.nodes(torch.ops.aten.linear.default)[0]
    mask = token_mask(program, list(inputs), linear)
    assert mask is not None
    assert mask.tolist() == [True, True, False, True, False, False]
    assert real_rows(torch.zeros(6, 4), mask).shape == (3, 4)


def test_gradients_reach_values_and_not_padding() -> None:
    program, data, _ = bert()
    site = program.fact(structure).attention[0]
    chosen = input_of(site.output)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    observe_gradients(program, data, [chosen], lambda node, value, gradient, mask: seen.append((value, gradient)))
    assert len(seen) == 2
    for (value, gradient), padded in zip(seen, (False, True), strict=True):
        assert value.shape == gradient.shape
        assert bool((gradient[:, :-2] != 0).any())
        assert bool((gradient[:, -2:] == 0).all()) is padded
    assert all(parameter.grad is None for parameter in program.graph_module.parameters())


@pytest.mark.parametrize("passes", ["low-rank{keep=0.5}", "prune-neurons{keep=0.5}", "sparsify{pattern=2:4,criterion=wanda}"])
def test_activations_that_overflow_are_refused(passes: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8)).half()
    with torch.no_grad():
        # 8 · 300 · 300 is above 65,504, the largest number in float16.
        model[0].weight.fill_(300)
    x = torch.full((4, 8), 300.0, dtype=torch.float16)
    with pytest.raises(RequirementError, match=r"of '(linear|relu).* infinite or NaN .* torch.float16"):
        captures.optimize(model, x, passes=passes, checks="off", data=[x])
