"""Tests of sparsify, with second-order pruning written out weight by weight as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.spelling import format_pass, parse_pipeline
from lissom.errors import LissomError, RequirementError, UnsupportedError
from lissom.passes import PASSES
from lissom.passes.prune.sparsify import BLOCK_NOTE, NOTE, Blocks, Sparsify, most, sparsegpt, wanda
from tests.support import captures
from tests.support.calibrated import MODELS, exact, moments_of, passed
from tests.support.harness import check_golden, rewrite
from tests.support.mixtures import EXPERTS, MIXTURES, mixture, program_of, samples, single_token, stacks
from tests.support.models import FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama

CRITERIA = ("magnitude", "wanda", "sparsegpt")
MATRICES = {"tiny_bert": 12, "tiny_gpt2": 8, "tiny_llama": 14, "tiny_t5": 14}


def zeros(program: Program, name: str) -> float:
    return float((program.weight(name) == 0).float().mean())


def obs(weight: torch.Tensor, rows: torch.Tensor, gone: torch.Tensor, damping: float) -> torch.Tensor:
    """Optimal brain surgeon from left to right, in float64, with the inverse Hessian of what is left computed anew each time.

    gone: [rows, columns], which weights go. What stays behind a weight that goes is changed by −w / [H⁻¹]₀₀ · [H⁻¹]₀.
    """
    weight, hessian = weight.double().clone(), rows.double().T @ rows.double()
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        for row in range(weight.shape[0]):
            if gone[row, column]:
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column] = 0
    return weight


def test_rewrites() -> None:
    """Only values change, so the text stays as it is; what was done stands in the notes."""
    _, history = rewrite(Sparsify(keep=0.25), seeded(FeedForward), normal(2, 5, 8))
    step = history.steps[1]
    assert step.relative_error is not None and step.relative_error > 0
    check_golden("sparsify", f"{history.texts[1]}\n{step.summary}\n{' '.join(step.notes)}\n")
    assert step.notes == (NOTE,)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_keeps_its_share_and_its_shape(name: str, criterion: str) -> None:
    dense = exact(MODELS[name])
    program, _ = passed(MODELS[name], f"sparsify{{keep=0.5,criterion={criterion}}}")
    changed = [key for key, weight in program.weights().items() if not torch.equal(weight, dense.weight(key))]
    assert len(changed) == MATRICES[name]
    for key in changed:
        assert program.weight(key).shape == dense.weight(key).shape
        assert not torch.signbit(program.weight(key)[program.weight(key) == 0]).any()
        # A block of columns or a row keeps a whole number of weights.
        assert zeros(program, key) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pattern_holds_along_the_features_in(criterion: str) -> None:
    """GPT-2 keeps its matrices the other way round."""
    for build, name, dim in (
        (tiny_gpt2, "h.0.mlp.c_proj.weight", 0),
        (tiny_llama, "model.layers.0.mlp.down_proj.weight", 1),
    ):
        program, _ = passed(build, f"sparsify{{pattern=2:4,criterion={criterion}}}")
        groups = (program.weight(name) != 0).unflatten(dim, (-1, 4)).sum(dim + 1)
        assert (groups == 2).all()


def test_magnitude_keeps_the_largest() -> None:
    dense = exact(tiny_llama).weights()
    for scope in ("layer", "global"):
        program, _ = passed(tiny_llama, f"sparsify{{keep=0.25,scope={scope}}}")
        names = [name for name in program.weights() if "proj" in name]
        for group in [[name] for name in names] if scope == "layer" else [names]:
            flat = torch.cat([dense[name].detach().flatten() for name in group])
            kept = torch.cat([program.weight(name).detach().flatten() for name in group])
            order = sorted(range(len(flat)), key=lambda index: -abs(float(flat[index])))
            wanted = torch.zeros_like(flat)
            wanted[order[: round(0.25 * len(flat))]] = flat[order[: round(0.25 * len(flat))]]
            assert torch.equal(kept, wanted)


@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 3)])
def test_wanda_ranks_each_row_by_size_times_norm(pattern: tuple[int, int] | None) -> None:
    weight, rows = normal(5, 12), normal(30, 12, seed=1) * torch.linspace(0.1, 3, 12)
    found = wanda(weight, moments_of(rows), pattern or 1 / 3)
    n, m = pattern or (4, 12)
    for i in range(5):
        for start in range(0, 12, m):
            scores = {
                j: abs(float(weight[i, j])) * sum(float(x) ** 2 for x in rows[:, j]) ** 0.5 for j in range(start, start + m)
            }
            kept = set(sorted(scores, key=scores.__getitem__)[-n:])
            assert {start + int(j) for j in found[i, start : start + m].nonzero()} == kept
    assert torch.equal(found[found != 0], weight[found != 0])


@pytest.mark.parametrize("block_size", [4, 8, 128])
@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_is_optimal_brain_surgeon(block_size: int, pattern: tuple[int, int] | None) -> None:
    """What the weights that stay become, given which go; blocks of any size give the same."""
    mixing = normal(12, 12, seed=2)
    weight, rows = normal(5, 12), normal(40, 12, seed=1) @ mixing
    found = sparsegpt(weight, moments_of(rows), pattern or 0.5, damping=0.01, block_size=block_size)
    wanted = obs(weight, rows, found == 0, damping=0.01)
    # Sums of products of order 1 in float32, through an inverse of condition 1e3.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3)
    assert float((found == 0).float().mean()) == 0.5


def test_sparsegpt_chooses_what_costs_least() -> None:
    """The first block goes by W² / U², U the upper factor of the inverse, here from a QR decomposition."""
    weight, rows = normal(6, 8), normal(50, 8, seed=1) @ normal(8, 8, seed=2)
    found = sparsegpt(weight, moments_of(rows), 0.5, damping=0.01, block_size=8)
    hessian = rows.double().T @ rows.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    # 1 / U_jj² is what is left of H_jj when column j is explained by those behind it.
    remaining = torch.tensor([1 / float(torch.linalg.inv(hessian[j:, j:])[0, 0]) for j in range(8)])
    scores = weight.double().square() * remaining
    assert torch.equal(found != 0, scores > scores.flatten().sort().values[23])


def test_sparsegpt_beats_wanda_and_wanda_beats_magnitude() -> None:
    mixing = normal(64, 64, seed=2) * normal(64, seed=3).exp()
    weight, rows = normal(32, 64), normal(400, 64, seed=1) @ mixing
    read = moments_of(rows)
    found = {
        "magnitude": weight.masked_fill(~most(weight.abs(), 0.5), 0),
        "wanda": wanda(weight, read, 0.5),
        "sparsegpt": sparsegpt(weight, read, 0.5, 0.01, 16),
    }
    errors = {name: float((rows @ (item - weight).T).norm()) for name, item in found.items()}
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def test_a_feature_that_is_always_zero_keeps_no_weight() -> None:
    rows = normal(40, 8)
    rows[:, 3] = 0
    found = sparsegpt(normal(4, 8), moments_of(rows), 0.5, 0.01, 128)
    assert torch.isfinite(found).all() and (found[:, 3] == 0).all()


class Chain(nn.Module):
    """Two layers, of which the second reads what the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x))) * 2 + x


def test_layer_is_calibrated_on_what_pruned_ones_give() -> None:
    module, data = seeded(Chain), [normal(6, 5, 8, seed=seed) for seed in (1, 2)]
    program = captures.optimize(module, data[0], passes="sparsify{keep=0.5,criterion=sparsegpt}", data=data).program
    rows = torch.cat([item.flatten(0, 1) for item in data])
    first = sparsegpt(module.first.weight.detach(), moments_of(rows), 0.5, 0.01, 128)
    between = torch.relu(nn.functional.linear(rows, first, module.first.bias)).detach()
    second = sparsegpt(module.second.weight.detach(), moments_of(between), 0.5, 0.01, 128)
    torch.testing.assert_close(program.weight("first.weight").detach(), first)
    torch.testing.assert_close(program.weight("second.weight").detach(), second)


class Twice(nn.Module):
    """One layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(torch.relu(self.layer(x)))


def test_shared_matrix_is_calibrated_on_all_its_layers() -> None:
    module, x = seeded(Twice), normal(6, 5, 8)
    program = captures.optimize(module, x, passes="sparsify{criterion=wanda}", data=[x]).program
    rows = torch.cat([x, torch.relu(module.layer(x))]).flatten(0, 1).detach()
    wanted = wanda(module.layer.weight.detach(), moments_of(rows), 0.5)
    assert torch.equal(program.weight("layer.weight"), wanted)


def test_embeddings_and_lm_head_stay_unless_asked_for() -> None:
    assert zeros(passed(tiny_llama, "sparsify")[0], "lm_head.weight") == 0
    program, _ = passed(tiny_llama, "sparsify{lm_head=true}")
    assert zeros(program, "lm_head.weight") == pytest.approx(0.5, abs=0.01)
    assert zeros(program, "model.embed_tokens.weight") == 0


def test_protected_layers_are_left_alone() -> None:
    program, history = passed(tiny_llama, 'sparsify{protect="model.layers.0,*.down_proj"}')
    assert {name for name in program.weights() if "proj" in name and zeros(program, name) == 0} == {
        *(name for name in program.weights() if "proj" in name and ".layers.0." in name),
        "model.layers.1.mlp.down_proj.weight",
    }
    assert history.steps[-1].summary == "rewrote 6 of 14; skipped 8: it is protected (8)"


def test_what_does_not_divide_is_reported() -> None:
    _, history = rewrite(Sparsify(pattern="2:5"), seeded(lambda: FeedForward(8, 10)), normal(2, 5, 8))
    assert history.steps[1].summary == "rewrote 1 of 2; skipped 1: its 8 input features are no multiple of 5"


def test_the_model_keeps_its_weights() -> None:
    module = seeded(FeedForward)
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    captures.optimize(module, normal(2, 5, 8), passes="sparsify{criterion=sparsegpt}", data=[normal(2, 5, 8)])
    assert all(torch.equal(weight, before[name]) for name, weight in module.named_parameters())


def test_without_data_the_criteria_that_need_it_say_so() -> None:
    with pytest.raises(RequirementError, match=r"sparsify\{criterion=wanda\} needs calibration data: pass data=, or choose"):
        rewrite(Sparsify(criterion="wanda"), seeded(FeedForward), normal(2, 5, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, "sparsify keeps a fraction of the weights above 0 and up to 1, not keep=0"),
        ({"keep": 0.3, "pattern": "2:4"}, "sparsify takes keep= or pattern=N:M, not both"),
        ({"pattern": "4:2"}, "pattern=4:2 is not known; write N:M with 0 < N < M, such as 2:4"),
        ({"pattern": "half"}, "pattern=half is not known"),
        ({"pattern": "blocks", "keep": 0.4}, "pattern=blocks is not known"),
        ({"scope": "global", "criterion": "wanda"}, "ranks by magnitude and takes no pattern"),
        ({"damping": 0.0}, "sparsify takes damping= above 0 and block_size= of 1 or more"),
        (
            {"block_size": 6, "pattern": "2:4", "criterion": "sparsegpt"},
            "sparsegpt takes block_size= in multiples of the 4 of its pattern, not 6",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError) as refusal:
        Sparsify(**options)
    assert message in str(refusal.value)


def test_the_pattern_is_spelt_as_it_is_written() -> None:
    (found,) = parse_pipeline("sparsify{pattern=2:4,criterion=wanda}", PASSES)
    assert (found, format_pass(found)) == (Sparsify(pattern="2:4", criterion="wanda"), "sparsify{pattern=2:4,criterion=wanda}")


def test_composes() -> None:
    case = tiny_bert()
    fast = captures.compile(case.model, case.inputs, passes="sparsify{pattern=2:4},cast{dtype=bf16}")
    assert NOTE in [note for step in fast.report.history.steps for note in step.notes]
    with torch.no_grad():
        assert fast(**case.kwargs).last_hidden_state.shape == (2, 5, 16)


def test_a_number_with_a_colon_is_a_word() -> None:
    with pytest.raises(LissomError, match="option 'keep' of sparsify takes a number"):
        parse_pipeline("sparsify{keep=2:4}", PASSES)


class BothWays(nn.Module):
    """One matrix as a linear layer and, transposed, as a product."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.up(x)) @ self.up.weight)


@pytest.mark.parametrize(
    "passes",
    ["sparsify{criterion=wanda}", "sparsify{criterion=sparsegpt}", "low-rank{rank=2}", "quantize{scheme=int8-weight},gptq"],
)
def test_matrix_read_in_both_orientations_is_left_alone(passes: str) -> None:
    model, x = seeded(BothWays), normal(4, 8)
    found = lissom.optimize(model, x, passes=passes, data=[(normal(4, 8, seed=seed),) for seed in range(3)])
    reasons = [skip.reason for step in found.report.history.steps for skip in step.skipped]
    assert "its weight is read in both orientations" in reasons


@pytest.mark.parametrize("options", ["", ",criterion=sparsegpt", ",scope=global"])
def test_equal_weights_keep_their_share(options: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.where(normal(8, 8) > 0, 0.5, -0.5))
    found = lissom.optimize(model, normal(32, 8), passes=f"sparsify{{keep=0.5{options}}}", data=[(normal(32, 8, seed=1),)])
    kept = [int(found.program.weight(name).count_nonzero()) for name in ("0.weight", "2.weight")]
    assert sum(kept) == 64 and ("global" in options or kept == [32, 32])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_pruned_one_by_one(name: str, criterion: str) -> None:
    data, passes = samples(), f"sparsify{{keep=0.5,criterion={criterion}}}"
    found = captures.optimize(mixture(name), data[0], passes=passes, data=data, checks="structural").program
    for weight in stacks(found).values():
        assert [float((expert == 0).float().mean()) for expert in weight] == pytest.approx([0.5] * EXPERTS, abs=0.05)
    if criterion == "magnitude":
        for weight, before in zip(stacks(found).values(), stacks(program_of(name)).values(), strict=True):
            assert torch.equal(weight, torch.where(weight == 0, 0, before))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_pattern_holds_in_the_rows_of_every_expert(criterion: str) -> None:
    data, passes = samples(), f"sparsify{{pattern=2:4,criterion={criterion}}}"
    for name in ("mixtral", "gpt-oss"):
        found = captures.optimize(mixture(name), data[0], passes=passes, data=data, checks="structural").program
        for weight in stacks(found).values():
            rows = weight.mT if name == "gpt-oss" else weight
            assert bool(((rows.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all())


def test_experts_without_tokens_stay_and_are_named() -> None:
    example, passes = samples(1)[0], "sparsify{keep=0.5,criterion=wanda}"
    found = captures.optimize(mixture("mixtral"), example, passes=passes, data=single_token(), checks="structural")
    before = stacks(program_of("mixtral"))
    whole = {
        name: [torch.equal(*pair) for pair in zip(weight, before[name], strict=True)]
        for name, weight in stacks(found.program).items()
    }
    assert [sum(item) for item in whole.values()] == [EXPERTS - 2] * 2
    reasons = {item.reason for item in found.report.history.steps[-1].skipped if "experts" in item.place}
    assert reasons == {"2 of its 4 experts: the calibration data gives it no tokens"}


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", MODELS)
def test_whole_blocks_are_kept(name: str, criterion: str) -> None:
    """A quarter of the blocks of 4 inputs by 32 features, which the eager backend skips; the rest is zero."""
    dense = exact(MODELS[name])
    program, history = passed(MODELS[name], f"sparsify{{pattern=block,keep=0.25,criterion={criterion}}}")
    assert BLOCK_NOTE in [note for step in history.steps for note in step.notes]
    changed = [key for key, weight in program.weights().items() if not torch.equal(weight, dense.weight(key))]
    assert len(changed) == MATRICES[name]
    for key in changed:
        weight = program.weight(key)
        # GPT-2 keeps its matrices the other way round.
        weight = weight.T if name == "tiny_gpt2" else weight
        blocks = (weight != 0).unflatten(1, (-1, 4)).sum(2)
        assert set(blocks.unique().tolist()) <= {0, 4}
        panels = [part for part in blocks.split(32)]
        assert all((part == part[0]).all() for part in panels)
        kept = torch.stack([part[0] > 0 for part in panels]).float().mean()
        # Of six blocks of a panel two are kept, and of ten two.
        assert float(kept) == pytest.approx(0.25, abs=0.09)


def test_blocks_that_matter_least_go() -> None:
    """By magnitude those with the least sum of squares, of all panels; by wanda with inputs as factors, within a panel."""
    weight, scales = normal(64, 16), torch.tensor([1.0, 1.0, 8.0, 1.0]).repeat_interleave(4)
    weight[:32] *= 100
    rows = torch.eye(16) * scales
    found = wanda(weight, moments_of(rows), Blocks(0.25))
    blocks = (found != 0).unflatten(1, (-1, 4)).any(2).unflatten(0, (2, 32)).any(1)
    assert blocks.tolist() == [[False, False, True, False]] * 2


def test_sparsegpt_compensates_for_blocks() -> None:
    """What stays is what optimal brain surgeon gives for the same zeros."""
    mixing = normal(16, 16, seed=2)
    weight, rows = normal(64, 16), normal(60, 16, seed=1) @ mixing
    found = sparsegpt(weight, moments_of(rows), Blocks(0.5), damping=0.01, block_size=8)
    # Sums of products of order 1 in float32, through an inverse of condition 1e3.
    torch.testing.assert_close(found.double(), obs(weight, rows, found == 0, damping=0.01), rtol=1e-3, atol=1e-3)
    assert float((found == 0).float().mean()) == 0.5


def test_blocks_by_amounts_and_what_they_refuse() -> None:
    program, history = passed(tiny_bert, 'sparsify{pattern=block,amounts="*.query=0.5"}')
    assert zeros(program, "encoder.layer.0.attention.self.query.weight") == 0.5
    assert zeros(program, "encoder.layer.0.attention.self.key.weight") == 0
    assert "pattern=block" in (history.steps[-1].per_site or "")
    with pytest.raises(UnsupportedError, match="block_size= in multiples of the 4 of its pattern, not 6"):
        Sparsify(pattern="block", criterion="sparsegpt", block_size=6)
    _, history = rewrite(Sparsify(pattern="block", keep=0.5, lm_head=True), seeded(lambda: nn.Linear(6, 8)), normal(2, 6))
    assert "its 6 input features are no multiple of 4" in history.steps[1].summary
