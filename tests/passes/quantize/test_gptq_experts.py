"""Tests of gptq on mixtures of experts, with the algorithm for one matrix as the oracle of each expert."""

from __future__ import annotations

import pytest
import torch

from lissom.compiler.analysis.structure.linear import input_of
from lissom.compiler.analysis.structure.matrix import rounded_matrix_of
from lissom.compiler.calibration.hessian import damped
from lissom.compiler.calibration.statistics import Moments
from lissom.compiler.ir.program import Program
from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.passes.quantize.gptq import fitted_scale, gptq
from tests.support import captures
from tests.support.mixtures import EXPERTS, MIXTURES, mixture, samples, single_token, stacked_products


def rows_by_expert(program: Program, data: list[dict[str, torch.Tensor]], layer: torch.fx.Node) -> list[list[torch.Tensor]]:
    """The rows that each expert reads, of each sample."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(EXPERTS)]
    for sample in data:
        seen: dict[torch.fx.Node, torch.Tensor] = {}
        with torch.no_grad():
            program.run(list(sample.values()), lambda node, value, seen=seen: seen.update({node: value}))
        start = 0
        for expert, end in enumerate(seen[layer.args[2]].tolist()):
            parts[expert].append(seen[input_of(layer)][start:end])
            start = end
    return parts


@pytest.mark.parametrize("scheme", ["int4-weight", "int8-weight"])
@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_is_fitted_to_its_own_rows(name: str, scheme: str) -> None:
    """The oracle treats each expert as a layer; only the first product is compared, before which nothing has changed."""
    data, passes = samples(), f"quantize{{scheme={scheme},only=*.experts}}"
    nearest, found = (
        captures.optimize(mixture(name), data[0], passes=text, data=data, checks="structural").program
        for text in (passes, f"{passes},gptq")
    )
    before, after = (stacked_products(program)[0] for program in (nearest, found))
    matrix, chosen = rounded_matrix_of(before, stacks=True), rounded_matrix_of(after, stacks=True)
    form, (scales, points) = FORMATS[str(matrix.quantizer.kwargs["format"])], matrix.read_scale(nearest)
    weights, errors = matrix.read(nearest), torch.zeros(2)
    for expert, rows in enumerate(rows_by_expert(nearest, data, before)):
        moments = Moments.empty(weights.shape[2])
        for part in rows:
            moments.add(part)
        gram, point = moments.gram, None if points is None else points[expert]
        wanted = gptq(weights[expert], gram, scales[expert], point, form, 0.01, 128, True)
        q = formats.quantize(wanted, scales[expert], point, form)
        levels = formats.dequantize(q, torch.ones_like(scales[expert]), point, torch.float32)
        scale = fitted_scale(weights[expert], levels, damped(gram, 0.01), scales[expert])
        assert torch.equal(chosen.read_scale(found)[0][expert], scale)
        written = chosen.read(found)[expert]
        assert torch.equal(written, formats.dequantize(q, scale, point, torch.float32))
        rounded = formats.dequantize(
            formats.quantize(weights[expert], scales[expert], point, form), scales[expert], point, torch.float32
        )
        for index, other in enumerate((rounded, written)):
            errors[index] += ((other - weights[expert]) @ torch.cat(rows).T).square().sum()
    assert errors[1] < 0.9 * errors[0]


def test_experts_without_tokens_are_rounded_to_nearest_and_named() -> None:
    example, data, passes = samples(1)[0], single_token(), "quantize{scheme=int8-weight,only=*.experts}"
    nearest, found = (
        captures.optimize(mixture("mixtral"), example, passes=text, data=data, checks="structural")
        for text in (passes, f"{passes},gptq")
    )
    (before, after), left = ([stacked_products(item.program)[0] for item in (nearest, found)]), []
    for expert, rows in enumerate(rows_by_expert(nearest.program, data, before)):
        same = torch.equal(
            *(
                rounded_matrix_of(node, stacks=True).read(item.program)[expert]
                for node, item in ((before, nearest), (after, found))
            )
        )
        assert same == (not len(torch.cat(rows)))
        left += [expert] if same else []
    assert len(left) == EXPERTS - 2
    step = found.report.history.steps[-1]
    assert {item.reason for item in step.skipped if "experts" in item.place} == {
        f"{len(left)} of its 4 experts: the calibration data gives it no tokens"
    }
