"""Tests of gptq, with optimal brain quantization written out weight by weight as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom import optimize
from lissom.compiler.analysis.structure.linear import is_linear
from lissom.compiler.analysis.structure.matrix import rounded_matrix_of
from lissom.compiler.calibration.hessian import damped, shifted
from lissom.compiler.calibration.observers import weight_scale
from lissom.compiler.ir.program import Program
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops import formats
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import fake_quantize
from lissom.passes.quantize.gptq import Gptq, fitted_scale, gptq, gptq_with_scales
from tests.support import captures
from tests.support.calibrated import MODELS, exact, moments_of, passed
from tests.support.harness import apply, capture_model, check_golden, rewrite
from tests.support.models import FeedForward, normal, seeded

SCHEMES = (
    "scheme=int4-weight,group=8,symmetric=true",
    "scheme=int4-weight,group=8,symmetric=false,weight_observer=mse",
    "scheme=int8-weight,granularity=tensor",
    "scheme=int8-weight,embeddings=true",
    "scheme=int8-dynamic,symmetric=false",
    "scheme=int8-static",
    "scheme=fp8",
)
ROUNDED = {"tiny_bert": 12, "tiny_gpt2": 8, "tiny_llama": 14, "tiny_t5": 14}


def obq(
    weight: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, low: int, high: int,
    damping: float, act_order: bool,
) -> torch.Tensor:  # fmt: skip
    """Optimal brain quantization in a fixed order, in float64, one weight at a time.

    After each weight the inverse Hessian of those left is computed anew, and they are changed by −(w - q) / [H⁻¹]₀₀ · [H⁻¹]₀.
    scale: [features out, groups].
    """
    weight, hessian = weight.double().clone(), rows.double().T @ rows.double()
    left = list(range(weight.shape[1]))
    if act_order:
        left.sort(key=lambda column: -float(hessian[column, column]))
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    while left:
        column = left[0]
        group = column * scale.shape[1] // weight.shape[1]
        inverse = torch.linalg.inv(hessian[left][:, left])
        for row in range(weight.shape[0]):
            step = float(scale[row, group])
            middle = 0 if zero_point is None else int(zero_point[row, group])
            held = (min(high, max(low, round(float(weight[row, column]) / step) + middle)) - middle) * step
            weight[row, left] -= (weight[row, column] - held) / inverse[0, 0] * inverse[0]
            weight[row, column] = held
        left = left[1:]
    return weight


def layer(scale_columns: int, form: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A weight [5, 12], correlated inputs, and the scales of its groups."""
    weight, rows = normal(5, 12), normal(40, 12, seed=1) @ normal(12, 12, seed=2)
    scale, zero_point = weight_scale(weight, (5, scale_columns), FORMATS[form], "min-max")
    return weight, rows, scale, zero_point


def error(rows: torch.Tensor, found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((rows @ (found - weight).T).norm())


def on_grid(program: Program) -> int:
    """How many weights that layers multiply with are rounded; each is on its grid to the last bit."""
    layers = (matrix for node in program.nodes() if is_linear(node) and not isinstance(matrix := rounded_matrix_of(node), str))
    names = {matrix.name: matrix.quantizer for matrix in layers}
    for name, node in names.items():
        weight = program.weight(str(name)).detach()
        parts = [program.weight(str(item.target)) for item in node.all_input_nodes[1:]]
        assert torch.equal(fake_quantize(weight, *parts, format=node.kwargs["format"]), weight), name
    return len(names)


def test_rewrites() -> None:
    """Only values change, so the text stays that of the program rounded to the nearest."""
    x = normal(4, 5, 8)
    module = seeded(FeedForward)
    found = captures.optimize(module, x, passes="quantize{scheme=int4-weight,group=4},gptq", data=[x])
    step = found.report.history.steps[-1]
    check_golden("gptq", f"{found.program.text()}\n{step.summary}\n")
    before = found.report.history.steps[-2]
    assert step.relative_error < before.relative_error


def test_leaves_other_programs_alone() -> None:
    program = exact(MODELS["tiny_bert"])
    after, history = passed(MODELS["tiny_bert"], "gptq")
    assert after.text() == program.text()
    assert history.steps[-1].summary == "rewrote 0 of 13; skipped 13: its weight is not quantized (13)"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_weights_lie_on_their_grid(name: str, scheme: str) -> None:
    """So that folding them into integers changes nothing, and each stored number is the one that was chosen."""
    for options in ("", "{act_order=false,rescale=mse}"):
        nearest, _ = passed(MODELS[name], f"quantize{{{scheme}}}")
        program, history = passed(MODELS[name], f"quantize{{{scheme}}},gptq{options}")
        assert history.steps[-1].rewritten == ROUNDED[name]
        changed = [key for key, weight in program.weights().items() if not torch.equal(weight, nearest.weight(key))]
        assert len([key for key in changed if not key.endswith(("_scale", "_zero_point"))]) == ROUNDED[name]
        on_grid(program)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block_size", [1, 5, 128])
@pytest.mark.parametrize(("form", "groups"), [("int4", 3), ("uint4", 3), ("int8", 1), ("uint8", 12)])
def test_numbers(form: str, groups: int, block_size: int, act_order: bool) -> None:
    weight, rows, scale, zero_point = layer(groups, form)
    found = gptq(weight, moments_of(rows).gram, scale, zero_point, FORMATS[form], 0.01, block_size, act_order)
    ends = int(FORMATS[form].low), int(FORMATS[form].high)
    wanted = obq(weight, rows, scale, zero_point, *ends, damping=0.01, act_order=act_order)
    # On one grid: another whole number would be a whole step away.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_per_tensor_and_per_channel_scales_are_taken() -> None:
    weight, rows, _, _ = layer(1, "int8")
    for shape in ((1, 1), (1, 12)):
        scale, _ = weight_scale(weight, shape, FORMATS["int8"], "min-max")
        found = gptq(weight, moments_of(rows).gram, scale, None, FORMATS["int8"], 0.01, 4, True)
        wanted = obq(weight, rows, scale.expand(5, shape[1]), None, -128, 127, damping=0.01, act_order=True)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_scales_chosen_midway_fit_the_current_weights() -> None:
    """The oracle rounds a group with the scale of what the group has become, then goes on with those behind it."""
    weight, rows, scale, _ = layer(3, "int4")
    found, chosen, _ = gptq_with_scales(weight, moments_of(rows).gram, scale, None, FORMATS["int4"], 0.01, "min-max")
    hessian = rows.double().T @ rows.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    left = weight.double().clone()
    for column in range(12):
        if column % 4 == 0:
            step = left[:, column : column + 4].abs().amax(1) / 7
            torch.testing.assert_close(chosen[:, column // 4].double(), step, rtol=1e-4, atol=0)
        inverse = torch.linalg.inv(hessian[column:, column:])
        held = (left[:, column] / step).round().clamp(-8, 7) * step
        left[:, column:] -= ((left[:, column] - held) / inverse[0, 0])[:, None] * inverse[0]
        left[:, column] = held
    torch.testing.assert_close(found.double(), left, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "rows_a_scale"), [((5, 3), 1), ((5, 1), 1), ((1, 1), 5)])
def test_scales_are_fitted_by_least_squares(shape: tuple[int, int], rows_a_scale: int) -> None:
    """The oracle solves for the scales of a block of rows at once, λ as rows of its own."""
    weight, rows, _, _ = layer(3, "int4")
    scale, _ = weight_scale(weight, shape, FORMATS["int4"], "min-max")
    levels = formats.quantize(weight, scale, None, FORMATS["int4"]).float()
    gram = moments_of(rows).gram
    found = fitted_scale(weight, levels, damped(gram, 0.01), scale)
    pull = (0.01 * gram.double().diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    read = torch.cat([rows.double(), pull])
    size = 12 // shape[1]
    for block in range(shape[0]):
        chosen = range(block * rows_a_scale, (block + 1) * rows_a_scale)
        design = torch.cat(
            [
                torch.stack(
                    [
                        read[:, start : start + size] @ levels[row, start : start + size].double()
                        for start in range(0, 12, size)
                    ],
                    1,
                )
                for row in chosen
            ]
        )
        wanted = torch.cat([read @ weight[row].double() for row in chosen])
        best = torch.linalg.lstsq(design, wanted).solution
        torch.testing.assert_close(found[block].double(), best, rtol=1e-4, atol=1e-6)


def test_negative_scales_and_those_of_zeros_stay() -> None:
    weight, levels = normal(2, 8), torch.zeros(2, 8)
    levels[0, :4], levels[1] = -weight[0, :4].sign(), weight[1].sign()
    levels[1, 4:] = 0
    scale = torch.full((2, 2), 0.5)
    found = fitted_scale(weight, levels, torch.eye(8, dtype=torch.float64), scale)
    assert torch.equal(found[0], scale[0]) and found[1, 1] == 0.5
    torch.testing.assert_close(found[1, 0], weight[1, :4].abs().mean())


def test_weights_shifted_to_previous_outputs_are_least_squares() -> None:
    weight, rows = normal(5, 12), normal(40, 12, seed=1)
    before = rows + 0.1 * normal(40, 12, seed=2) @ normal(12, 12, seed=3)
    gram, shift = moments_of(rows).gram, (before - rows).T @ rows
    found = shifted(weight, gram, shift, 0.1)
    pull = (0.1 * gram.double().diagonal().mean()).sqrt() * torch.eye(12, dtype=torch.float64)
    read = torch.cat([rows.double(), pull])
    wanted = torch.cat([before.double() @ weight.double().T, pull @ weight.double().T])
    torch.testing.assert_close(found.double(), torch.linalg.lstsq(read, wanted).solution.T, rtol=1e-4, atol=1e-5)


def test_it_errs_less_than_rounding_to_the_nearest() -> None:
    weight, rows = normal(32, 64), normal(400, 64, seed=1) @ (normal(64, 64, seed=2) * normal(64, seed=3).exp())
    scale, _ = weight_scale(weight, (32, 2), FORMATS["int4"], "min-max")
    nearest = fake_quantize(weight, scale, format="int4")
    plain, ordered = (
        gptq(weight, moments_of(rows).gram, scale, None, FORMATS["int4"], 0.01, 16, order) for order in (False, True)
    )
    assert error(rows, ordered, weight) < error(rows, plain, weight) < 0.75 * error(rows, nearest, weight)


def test_feature_that_is_always_zero_is_rounded_to_nearest() -> None:
    weight, rows, scale, _ = layer(1, "int4")
    rows[:, 3] = 0
    found = gptq(weight, moments_of(rows).gram, scale, None, FORMATS["int4"], 0.01, 128, True)
    rounded = formats.quantize(weight, scale, None, FORMATS["int4"])
    assert torch.equal(found[:, 3], formats.dequantize(rounded, scale, None, torch.float32)[:, 3])


class Chain(nn.Module):
    """Two layers, of which the second reads what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) * 2 + x


@pytest.mark.parametrize("scheme", ["int8-weight", "int8-dynamic"])
def test_layer_is_calibrated_on_what_rounded_ones_give(scheme: str) -> None:
    """Rounded values too, where the scheme rounds what layers read."""
    module, data = seeded(Chain), [normal(6, 5, 8, seed=seed) for seed in (1, 2)]
    passes = f"quantize{{scheme={scheme}}},gptq{{act_order=false,asymmetric=false,refit=false}}"
    program = captures.optimize(module, data[0], passes=passes, data=data).program

    def read(value: torch.Tensor) -> torch.Tensor:
        if scheme == "int8-weight":
            return value
        low, high = value.amin(-1, keepdim=True).clamp_max(0), value.amax(-1, keepdim=True).clamp_min(0)
        step = (high - low) / 255
        zero_point = (-low / step).round()
        return ((value / step).round() + zero_point).clamp(0, 255).sub(zero_point) * step

    rows = read(torch.cat([item.flatten(0, 1) for item in data]))
    for name, layer in (("first", module.first), ("second", module.second)):
        weight = layer.weight.detach()
        scale, _ = weight_scale(weight, (8, 1), FORMATS["int8"], "min-max")
        wanted = gptq(weight, moments_of(rows).gram, scale, None, FORMATS["int8"], 0.01, 128, False)
        torch.testing.assert_close(program.weight(f"{name}.weight").detach(), wanted)
        rows = read(torch.relu(nn.functional.linear(rows, wanted, layer.bias)).detach())


class Normed(nn.Module):
    """Two layers, each with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.layer_norm, self.rms_norm = nn.LayerNorm(8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rms_norm(self.second(torch.relu(self.layer_norm(self.first(x)))))


def test_layers_fit_previous_outputs_with_norm_weighted_tokens() -> None:
    """The oracle goes through both programs by hand: W·x₀ is wanted, each token divided by the variance or mean square."""
    module, x = seeded(Normed), normal(60, 8, seed=1) * normal(60, 1, seed=2).exp()
    rounding = "quantize{scheme=int4-weight,granularity=channel,symmetric=true,weight_observer=min-max}"
    passes = f"{rounding},gptq{{act_order=false,refit=false,pull=0.2}}"
    program = captures.optimize(module, x, passes=passes, data=[x]).program
    before = now = x
    for name, linear in (("first", module.first), ("second", module.second)):
        weight = linear.weight.detach()
        scale, _ = weight_scale(weight, (8, 1), FORMATS["int4"], "min-max")
        nearest = nn.functional.linear(now, fake_quantize(weight, scale, format="int4"), linear.bias).detach()
        counts = 1 / (nearest.var(-1, correction=0) if name == "first" else nearest.square().mean(-1))
        weighted = now * counts[:, None]
        wanted = shifted(weight, weighted.T @ now, (before - now).T @ weighted, 0.2)
        held = gptq(wanted, weighted.T @ now, scale, None, FORMATS["int4"], 0.01, 128, False)
        torch.testing.assert_close(program.weight(f"{name}.weight").detach(), held)
        with torch.no_grad():
            before = torch.relu(module.layer_norm(linear(before)))
            now = torch.relu(module.layer_norm(nn.functional.linear(now, held, linear.bias)))


class TiedTable(nn.Module):
    """A table that is looked up in and multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.layer(self.table(ids))), self.table.weight)


@pytest.mark.parametrize(
    ("passes", "tables"),
    [
        ("quantize{scheme=int8-weight,embeddings=true},gptq{tables=true}", True),
        ("quantize{scheme=int8-weight,embeddings=true},gptq{tables=false}", False),
        ("quantize{scheme=int8-weight,embeddings=true},gptq", False),
        ("quantize{scheme=int4-weight,group=8,embeddings=true},gptq", True),
        ("quantize{scheme=int4-weight,group=8},gptq", False),
    ],
)
def test_tied_table_is_calibrated_on_lm_head_inputs(passes: str, tables: bool) -> None:
    module, ids = seeded(TiedTable), torch.arange(12).reshape(2, 6)
    found = captures.optimize(module, ids, passes=passes, data=[ids])
    on_grid_or_untouched = found.program.weight("table.weight").detach()
    if not tables:
        assert torch.equal(on_grid_or_untouched, module.table.weight.detach())
        reason = "its weight is an embedding table too; tables=true treats both"
        assert found.report.history.steps[-1].summary == f"rewrote 1 of 2; skipped 1: {reason}"
        return
    assert on_grid(found.program) == 2


def test_table_stays_nearer_to_its_rows_than_layer_does() -> None:
    module, ids = seeded(TiedTable), torch.arange(12).reshape(2, 6)

    def distance(options: str) -> float:
        passes = f"quantize{{scheme=int4-weight,group=8,embeddings=true}},gptq{{{options}}}"
        table = captures.optimize(module, ids, passes=passes, data=[ids]).program.weight("table.weight")
        return float((table - module.table.weight).detach().norm())

    assert distance("damping=0.01") == distance("damping=10.0") == distance("table_damping=0.5")
    assert distance("damping=0.01") < distance("table_damping=0.01")


def test_patterns_choose_layers() -> None:
    _, history = passed(MODELS["tiny_llama"], 'quantize{scheme=int8-weight},gptq{skip="*.down_proj"}')
    assert history.steps[-1].summary.startswith("rewrote 12 of 15; skipped 3: skip= names it (2)")
    _, history = passed(MODELS["tiny_llama"], 'quantize{scheme=int8-weight},gptq{only="model.layers.0"}')
    assert history.steps[-1].summary.startswith("rewrote 7 of 15; skipped 8: only= does not name it (7)")


def test_without_data_it_says_so() -> None:
    with pytest.raises(RequirementError, match="gptq needs calibration data: pass data=, or leave gptq out"):
        rewrite(Gptq(), seeded(FeedForward), normal(2, 5, 8))


def test_recipe_small_fits_weights_where_there_are_data() -> None:
    model, inputs = seeded(lambda: nn.Linear(64, 32)), normal(8, 64)
    rounded, fitted = (optimize(model, inputs, passes="small", data=data) for data in ((), [inputs]))
    note = "weights are rounded to nearest; with data= they are chosen by GPTQ, and lose less"
    assert rounded.report.history.steps[-1].notes == (note,)
    named = optimize(model, inputs, passes="quantize{scheme=int4-weight,lm_head=true},gptq", data=[inputs])
    weight = named.program.weight("weight")
    assert torch.equal(fitted.program.weight("weight"), weight)
    assert not torch.equal(rounded.program.weight("weight"), weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "gptq takes damping=, table_damping= and pull= above 0 and block_size= of 1 or more"),
        ({"table_damping": 0.0}, "gptq takes damping=, table_damping= and pull= above 0 and block_size= of 1 or more"),
        ({"pull": 0.0}, "gptq takes damping=, table_damping= and pull= above 0 and block_size= of 1 or more"),
        ({"rescale": "mse", "act_order": True}, "chooses the scale of a group when its columns are reached together"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        Gptq(**options)
    assert message in str(refusal.value)


def test_composes() -> None:
    """Folded into integers, the program gives the same to the last bit."""
    x = normal(4, 5, 8)
    passes = "quantize{scheme=int4-weight,group=4},gptq"
    module = seeded(FeedForward)
    found = captures.optimize(module, x, passes=passes, data=[x]).program
    folded, history = apply("fold-quantized-weights", found, [x])
    assert history.steps[-1].relative_error == 0
    assert torch.equal(folded(x), found(x))
    assert capture_model(module, x).program.weight("up.weight").data_ptr() == module.up.weight.data_ptr()
