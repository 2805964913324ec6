"""Tests of lissom.inspect.node_errors and Report.errors."""

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import lissom
from lissom import ops
from lissom.errors import InputError, UnsupportedError
from lissom.inspect.node_errors import rms_error
from lissom.ops.native import load_kernels
from tests.passes.prune.pack_tokens.test_pack_tokens import Encoder, inputs
from tests.support.models import seeded


class Attention(nn.Module):
    """Two layers of self-attention of four heads; tokens that `seen` does not name are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            mixed = functional.scaled_dot_product_attention(q, k, v, seen[:, None, None, :])
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x


def padded_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    seen = torch.ones(2, 24, dtype=torch.bool)
    seen[1, 17:] = False
    return 4 * torch.randn(2, 24, 16), seen


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return Attention().eval(), padded_inputs()


def optimized(case, passes):
    return lissom.optimize(*case, passes=passes, checks="structural", dynamic=False)


def values(program, inputs):
    found = {}
    with torch.no_grad():
        program.run(inputs, lambda node, value: found.update({node.name: value}))
    return found


def test_every_error_is_that_of_the_two_values(case):
    found = optimized(case, "cast{dtype=bf16}")
    errors = found.report.errors().nodes
    before = values(optimized(case, "exact").program, case[1])
    after = values(found.program, case[1])
    floats = [name for name, value in after.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    compared = [name for name in floats if name in before]
    assert compared and set(compared) <= set(errors)
    for name in compared:
        x, y = before[name].double().flatten().tolist(), after[name].double().flatten().tolist()
        wanted = math.sqrt(sum((b - a) ** 2 for a, b in zip(x, y, strict=True)) / sum(a * a for a in x))
        assert errors[name] == pytest.approx(wanted, rel=1e-4)  # sums of float32 differences in float64
    assert 1e-4 < errors["add_1"] < 1e-2


def test_an_exact_program_has_no_errors(case):
    errors = optimized(case, "exact").report.errors()
    assert set(errors.nodes.values()) == {0.0} and not errors.kept_mass
    assert len(errors.nodes) > 10


def test_nodes_are_found_by_what_they_replaced(case):
    model, inputs = case
    compiled = lissom.compile(model, inputs, checks="structural", dynamic=False)
    errors = compiled.report.errors()
    names = {node.name for node in compiled.program.nodes()}
    renamed = names - {node.name for node in optimized(case, "exact").program.nodes()}
    assert renamed & set(errors.nodes) and set(errors.nodes) <= names
    assert max(errors.nodes.values()) < 1e-5


def test_the_kept_mass_is_that_of_the_window(case):
    found = optimized(case, "sparsify-attention{pattern=window,window=3}")
    masses = found.report.errors().kept_mass
    seen = case[1][1]
    before = values(optimized(case, "exact").program, case[1])
    attentions = optimized(case, "exact").program.nodes(torch.ops.aten.scaled_dot_product_attention.default)
    for node, mass in zip(attentions, masses.values(), strict=True):
        q, k = (before[item.name].double() for item in node.args[:2])
        kept = total = 0.0
        for row in range(2):
            for query in range(24):
                if not seen[row, query]:
                    continue
                weights = (q[row, :, query, None] * k[row]).sum(-1).mul(0.5).masked_fill(~seen[row], -math.inf).softmax(-1)
                near = [key for key in range(24) if abs(key - query) < 3 or (abs(key - query) == 3 and _includes(found, 3))]
                kept, total = kept + float(weights[:, near].sum()), total + float(weights.sum())
        assert mass == pytest.approx(kept / total, abs=1e-5)
        assert 0.05 < mass < 0.95


def _includes(found, distance):
    """Whether the window of the program reaches that far."""
    mask = values(found.program, [torch.zeros(2, 24, 16), torch.ones(2, 24, dtype=torch.bool)])
    (node, *_) = found.program.nodes(torch.ops.aten.scaled_dot_product_attention.default)
    return bool(mask[node.args[3].name].expand(2, 4, 24, 24)[0, 0, 0, distance])


WINDOW = "sparsify-attention{pattern=window,window=3}"
SPARSE = "lower-sparse-attention{always=true}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "lowering", "target"),
    [
        (Attention, SPARSE, ops.block_sparse_attention),
        (Attention, "fuse-attention", ops.fused_attention),
        (Attention, "fuse-attention,fuse-merged-attention", ops.merged_attention),
        (lambda: Encoder("zeroed"), f"zero-padding,pack-tokens,{SPARSE},fuse-unpadded-attention", ops.unpadded_attention),
    ],
    ids=["sparse", "fused", "merged", "unpadded"],
)
def test_an_attention_kernel_keeps_the_same_mass(build, lowering, target):
    if load_kernels():
        pytest.skip(load_kernels())
    given = seeded(build), inputs(5, 12) if target is ops.unpadded_attention else padded_inputs()
    wanted = optimized(given, WINDOW).report.errors().kept_mass
    lowered = optimized(given, f"{WINDOW},{lowering}")
    assert len(list(lowered.program.nodes(target))) == 2
    # Sums of float32 weights over some hundred pairs of tokens.
    assert list(lowered.report.errors().kept_mass.values()) == pytest.approx(list(wanted.values()), rel=1e-5)


def test_it_prints_as_a_table(case):
    errors = optimized(case, "sparsify-attention{pattern=window,window=3}").report.errors()
    assert "largest error" in str(errors) and "softmax mass of the original" in str(errors)
    assert "layers.*" in str(errors)


@pytest.mark.parametrize(
    ("wanted", "found", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.0], [0.0, 4.0], 0.6),
        ([3.0, -math.inf], [3.0, 5.0], 0.0),
        ([3.0, 4.0], [3.0, math.nan], 0.8),
        ([0.0, 0.0], [0.0, 1e-9], 1.0),
        ([0.0, -3.4e38], [0.0, 0.0], 0.0),
    ],
)
def test_the_error_of_two_values(wanted, found, error):
    assert rms_error(torch.tensor(wanted), torch.tensor(found)) == pytest.approx(error)


def test_other_shapes_and_integers_have_no_error():
    assert rms_error(torch.ones(2), torch.ones(3)) is None
    assert rms_error(torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)) is None
    assert rms_error((torch.ones(2), 1), (torch.zeros(2), 1)) == 1.0


@pytest.mark.slow
def test_model_may_be_given_and_must_be_same(case):
    model, inputs = Attention().eval(), case[1]
    report = lissom.optimize(model, inputs, checks="structural", dynamic=False).report
    assert report.errors(model).nodes == report.measured_errors.nodes
    with pytest.raises(InputError, match="is not the one that Attention was made of"):
        report.errors(Other())
    with pytest.raises(InputError, match=r"model is a str; give the module or the program that was compiled"):
        report.errors("model")
    fixed = lissom.compile(model, inputs, checks="structural", dynamic=False).report
    del model, report
    gc.collect()
    with pytest.raises(InputError, match=r"the model that Attention was made of is gone; give it: report.errors\(model\)"):
        fixed.errors()


def test_program_is_compared_with_program_it_was_made_of(case):
    first = optimized(case, "cast{dtype=bf16}").program
    report = lissom.optimize(first, case[1], checks="structural").report
    assert set(report.errors().nodes.values()) == {0.0}


@pytest.mark.slow
def test_a_loaded_model_has_no_original(case, tmp_path):
    lissom.compile(*case, checks="structural", dynamic=False).save(tmp_path / "saved")
    with pytest.raises(UnsupportedError, match="was loaded or runs on several ranks, so there is no original"):
        lissom.load(tmp_path / "saved").report.errors()


class Other(Attention):
    """The same with one layer fewer."""

    def __init__(self) -> None:
        super().__init__()
        del self.layers[1]


class Counting(nn.Module):
    """Adds its input to what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.copy_(self.kept + x.sum(0))
        return x + self.kept


def test_state_is_not_shared_between_the_two_programs():
    model = Counting()
    report = lissom.optimize(model, torch.ones(2, 4), checks="structural", dynamic=False).report
    assert set(report.errors().nodes.values()) == {0.0}
    assert not model.kept.any()


def test_a_module_whose_name_is_markup():
    model = nn.Sequential()
    model.add_module("[/b]", nn.Linear(4, 4))
    found = lissom.optimize(model, torch.randn(2, 4), passes="quantize{scheme=int8-weight}")
    assert "[/b]" in str(found.report.errors(model))
