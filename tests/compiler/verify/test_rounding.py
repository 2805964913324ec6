"""Tests of lissom.compiler.verify.rounding."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import lissom
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.editor import Editor
from lissom.compiler.pipeline.pass_kinds import Rewrite
from lissom.compiler.verify.divergence import LOCAL_TOLERANCE, TOLERANCE, relative_error
from lissom.compiler.verify.rounding import (
    LOCAL_FLOAT_TOLERANCE,
    differs_locally,
    local_errors,
    local_tolerances,
    rounds_values,
)
from lissom.compiler.verify.rounding_loss import rounding_loss
from lissom.errors import VerifyError
from lissom.ops.native import kernel_dtypes, multiplies_bfloat16
from lissom.passes import PASSES
from tests.support import captures
from tests.support.harness import Calls, apply
from tests.support.models import normal, tiny_bert

aten = torch.ops.aten


@dataclass(frozen=True)
class Shake(Rewrite):
    """Multiplies what every layer norm gives; by a millionth, as a sum in another order would, or by more."""

    by: float

    def run(self, edit: Editor) -> None:
        for node in edit.nodes(aten.layer_norm.default):
            readers = list(node.users)
            with edit.before(node.next):
                moved = edit.call(aten.mul.Tensor, node, 1 + self.by)
            for reader in readers:
                reader.replace_input_with(node, moved)
            edit.rewritten += 1


def test_weights_alone_are_no_rounding_of_values() -> None:
    case = tiny_bert()
    plain = captures.optimize(case.model, case.inputs).program
    weights = captures.optimize(case.model, case.inputs, passes="quantize{scheme=int8-weight}").program
    values = captures.optimize(case.model, case.inputs, passes="quantize").program
    assert [rounds_values(item) for item in (plain, weights, values)] == [False, False, True]


def test_a_last_bit_is_told_from_a_mistake() -> None:
    case = tiny_bert()
    passes = [PASSES["quantize"]()]
    captures.optimize(case.model, case.inputs, passes=[*passes, Shake(1e-6)])
    with pytest.raises(VerifyError, match="its outputs differ from the program before"):
        captures.optimize(case.model, case.inputs, passes=[*passes, Shake(0.02)])


def test_amplified_rounding_is_told_from_a_mistake() -> None:
    """A thousand times a norm's last bit is more than two float32 programs are allowed; a node's own rounding is not."""
    module = Calls(lambda x, weight: torch.sin(1000 * torch.nn.functional.layer_norm(x, (8,), weight)))
    inputs = normal(4, 8), normal(8, seed=1)
    error = captures.optimize(module, inputs, passes=[Shake(1e-6)], dynamic=False).report.history.steps[-1].relative_error
    assert error is not None and error > TOLERANCE[torch.float32]
    with pytest.raises(VerifyError, match="its outputs differ from the program before"):
        captures.optimize(module, inputs, passes=[Shake(1e-4)], dynamic=False)


class Reverses(Rewrite):
    """Adds the products of a linear layer in the reverse order, times a factor that is 1 where the pass is right."""

    def __init__(self, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        self.factor, self.dtype = factor, dtype

    def run(self, edit: Editor) -> None:
        (layer,) = edit.nodes(aten.linear.default)
        x, weight = layer.args
        with edit.before(layer):
            x, weight = (edit.call(aten.flip.default, edit.call(aten.to.dtype, item, self.dtype), [-1]) for item in (x, weight))
            found = edit.call(aten.mul.Tensor, edit.call(aten.linear.default, x, weight), self.factor)
            found = edit.call(aten.to.dtype, found, torch.float32)
        edit.replace(layer, found)


@pytest.mark.parametrize("factor", [1.0, 1.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_cancels_rounds_by_more_than_others(factor: float, dtype: torch.dtype) -> None:
    """Terms a hundred times the sum: float32 is then right to some 1e-5, in whatever order, as float64 shows."""
    half, weight = normal(16, 256), 1e2 * normal(8, 256, seed=1)
    x = torch.cat([half, half + 1e-2 * normal(16, 256, seed=2)], -1)
    model = torch.nn.Linear(512, 8, bias=False)
    model.weight = torch.nn.Parameter(torch.cat([weight, -weight], -1))
    before = captures.optimize(model, x).program
    edit = Editor(before.copy(), "reverses")
    Reverses(factor, dtype).run(edit)
    assert max(local_errors(before, edit.program, [[x]]).values()) > LOCAL_FLOAT_TOLERANCE[torch.float32]
    assert differs_locally(before, edit.program, [[x]]) == (factor != 1)
    assert differs_locally(before, edit.program, [[x]], strict=True) == (factor != 1 or dtype is torch.float32)


@pytest.mark.skipif(torch.bfloat16 not in kernel_dtypes(), reason="no kernels in bfloat16 here")
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight"])
def test_cancelling_bfloat16_outliers_are_no_kernel_mistake(scheme: str) -> None:
    """The simulation rounds quantized values to bfloat16, where 300 has steps of 2; the kernel multiplies whole numbers."""
    x, model = normal(9, 64), torch.nn.Linear(64, 40, bias=False)
    x[:, 0], x[:, 1] = 300 + x[:, 0], 250 + x[:, 1]
    with torch.no_grad():
        model.weight[:, 0], model.weight[:, 1] = 1.0, -1.2
    before = captures.optimize(model.bfloat16(), x.bfloat16(), passes=f"quantize{{scheme={scheme},lm_head=true}}").program
    after, _ = apply("fold-quantized-weights,pack-quantized-linear", before, [x.bfloat16()])
    allowed = local_tolerances(before)
    errors = local_errors(before, after, [[x.bfloat16()]])
    # A processor that multiplies bfloat16 rounds weights to it, as the simulation does.
    if scheme == "int8-dynamic" or not multiplies_bfloat16():
        assert any(error > allowed[name] for name, error in errors.items())
    assert not differs_locally(before, after, [[x.bfloat16()]])


def test_every_node_is_given_what_its_inputs_were() -> None:
    case = tiny_bert()
    before = captures.optimize(case.model, case.inputs, passes="quantize").program
    sample = before.signature.flatten((), case.kwargs)
    assert max(local_errors(before, before, [sample]).values()) == 0
    assert not differs_locally(before, before, [sample])
    after = before.copy()
    edit = Editor(after, "break")
    weight = after.nodes(aten.layer_norm.default)[0].args[2]
    edit.set_weight(weight, after.weight(str(weight.target)) * 1.05)
    wrong = {name: error for name, error in local_errors(before, after, [sample]).items() if error > LOCAL_TOLERANCE}
    assert wrong == {"layer_norm": pytest.approx(0.05, rel=0.1)}
    assert differs_locally(before, after, [sample])


def test_short_dtypes_are_allowed_their_own_rounding() -> None:
    case = tiny_bert()
    short = captures.optimize(case.model, case.inputs, passes="cast{dtype=bf16},quantize").program
    plain = captures.optimize(case.model, case.inputs, passes="quantize").program
    assert set(local_tolerances(plain).values()) == {LOCAL_TOLERANCE}
    assert max(local_tolerances(short).values()) == pytest.approx(LOCAL_TOLERANCE + 16e-3)


def test_loss_of_rounding_is_that_to_program_without() -> None:
    case = tiny_bert()
    program = captures.optimize(case.model, case.inputs, passes="quantize").program
    weights = captures.optimize(case.model, case.inputs, passes="quantize{scheme=int8-weight}").program
    sample = program.signature.flatten((), case.kwargs)
    with torch.no_grad():
        outputs, plain = program.run(sample), weights.run(sample)
    wanted = max(map(relative_error, plain, outputs))
    assert rounding_loss(program, [sample], [outputs]) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("quantize", "options"),
    [
        ("quantize", ""),
        ("quantize{activations=tensor}", ""),
        ("cast{dtype=bf16},quantize{scheme=fp8}", ""),
        ("quantize", ",triton=true"),
        ("quantize{activations=tensor}", ",triton=true"),
    ],
)
def test_operators_rounding_loss_is_that_of_replaced_nodes(quantize: str, options: str) -> None:
    case = tiny_bert()
    passes = f"{quantize},fold-quantized-weights"
    before = captures.optimize(case.model, case.inputs, passes=passes).program
    lower = f"lower-quantized-products{{always=true{options}}},fuse-epilogues"
    after = captures.optimize(case.model, case.inputs, passes=f"{passes},{lower}").program
    sample = before.signature.flatten((), case.kwargs)
    assert rounds_values(after)
    with torch.no_grad():
        found, wanted = (rounding_loss(item, [sample], [item.run(sample)]) for item in (after, before))
    # In bfloat16 both programs round sums besides, each in its own places, and outputs are no finer than 4e-3.
    assert found == pytest.approx(wanted, rel=0.05, abs=4e-3 if "cast" in quantize else 0)


class Queries(torch.nn.Module):
    """Causal attention with an added mask of -1e4 or so, as older models write it."""

    def __init__(self, fill: float = -1e4) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(1, 2)
        causal = torch.full((x.shape[1], x.shape[1]), self.fill, dtype=x.dtype).triu(1)
        return (scores + causal + (1 - mask[:, None].to(x.dtype)) * self.fill).softmax(-1) @ x


@pytest.mark.parametrize(("dtype", "fill"), [(torch.bfloat16, -1e4), (torch.float32, -1e6)])
def test_queries_that_see_padding_alone_are_told_from_mistake(dtype: torch.dtype, fill: float) -> None:
    """In bfloat16 -1e4 swallows their scores, and in a kernel that adds in float32 it does not; in float32 -1e6 does so."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    inputs = normal(2, 6, 8).to(dtype), mask
    history = captures.optimize(Queries(fill), inputs, checks="each").report.history
    (raised,) = [step for step in history.steps if step.spelling == "raise-attention"]
    assert raised.rewritten == 1 and (dtype is torch.float32 or raised.relative_error > 0.02)
    with pytest.raises(VerifyError, match=r"^double was rolled back: its outputs differ from the program before"):
        captures.optimize(Queries(fill), inputs, passes=[PASSES["raise-attention"](), Double()])


def test_onnx_runtime_may_round_them_in_its_own_way() -> None:
    """Found by tools/fuzz: models were refused for what queries of padding see."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    fast = captures.compile(Queries(-1e6), (normal(2, 6, 8), mask), backend=lissom.OnnxRuntime(timing_seconds=0.0))
    assert fast.report.history.steps[-1].relative_error is not None


@dataclass(frozen=True)
class Double(Rewrite):
    """Wrong: the scores are twice as large."""

    def run(self, edit: Editor) -> None:
        (node,) = edit.nodes(aten.scaled_dot_product_attention.default)
        scale = nodes.argument(node, "scale")
        nodes.set_argument(node, "scale", 2 * (1.0 if scale is None else scale))
        edit.program.edits += 1
