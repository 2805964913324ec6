"""Tests of prune-hidden: the stream is zero where it is said to be, and what reads it is fitted by least squares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes import PASSES
from lissom.passes.prune.prune_hidden import PruneHidden, fit
from tests.support import captures
from tests.support.harness import check_golden, rewrite
from tests.support.models import Case, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens

Build = Callable[[], Case]
MODELS = {build.__name__: build for build in (tiny_bert, tiny_gpt2, tiny_llama, tiny_t5)}


@cache
def exact(build: Build) -> Program:
    case = build()
    return captures.optimize(case.model, case.inputs).program


def batches(program: Program) -> list[Sample]:
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[1, 3:] = 0
    given = [{"input_ids": tokens(6, seed=seed), "attention_mask": mask} for seed in range(4)]
    return [program.signature.flatten((), inputs) for inputs in given]


def pruned(build: Build, passes: str, data: bool = True) -> tuple[Program, History]:
    program = exact(build)
    flat = batches(program)
    return Pipeline(parse_pipeline(passes, PASSES), samples=flat[:1], data=flat if data else ()).run(program)


def streams(program: Program, sample: Sample) -> list[torch.Tensor]:
    """The residual stream behind every attention and feed-forward, [batch, tokens, channels]."""
    sites = program.fact(structure)
    sums = {site.residual for site in (*sites.attention, *sites.feed_forward)}
    seen: list[torch.Tensor] = []
    program.run(sample, lambda node, value: seen.append(value.detach()) if node in sums else None)  # pyright: ignore
    return seen


def test_rewrites() -> None:
    """Only values change, so the text stays as it is."""
    options = PruneHidden(keep=0.5, round_to=2, criterion="magnitude", reconstruct=False)
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 8), FeedForward(), nn.Linear(8, 3)))
    _, history = rewrite(options, model, tokens() % 7)
    assert history.texts[0] == history.texts[1]
    check_golden("prune_hidden", f"{history.texts[1]}\n{history.steps[1].summary}\n")


@pytest.mark.parametrize("reconstruct", ["true", "false"])
@pytest.mark.parametrize("name", MODELS)
def test_the_stream_has_exactly_the_channels_kept(name: str, reconstruct: str) -> None:
    program, _ = pruned(MODELS[name], f"prune-hidden{{keep=0.75,round_to=4,reconstruct={reconstruct}}}")
    found = streams(program, batches(program)[0])
    assert len(found) == 4
    dead = [(value == 0).flatten(0, -2).all(0) for value in found]
    assert all(int(channels.sum()) == 4 and torch.equal(channels, dead[0]) for channels in dead)
    assert not any(
        torch.signbit(weight[weight == 0]).any() for weight in program.weights().values() if weight.is_floating_point()
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_reads_a_dead_channel_reads_nothing(name: str) -> None:
    """Whatever stands in the columns of dead channels changes nothing: all that is read there is zero."""
    program, _ = pruned(MODELS[name], "prune-hidden{keep=0.5}")
    sites = program.fact(structure)
    for layer in [*sites.attention[0].q, *sites.feed_forward[0].up]:
        name = str(layer.all_input_nodes[-1].target)
        weight = program.weight(
            next(item for item in (name, name.replace("bias", "weight")) if program.weight(item).dim() == 2)
        )
        dim = 1 if "c_" not in name else 0
        assert int((weight == 0).all(1 - dim).sum()) == 8


@pytest.mark.parametrize("name", MODELS)
def test_what_is_zeroed_is_then_eliminated_exactly(name: str) -> None:
    program, history = pruned(MODELS[name], "prune-hidden{keep=0.5},eliminate-dead")
    assert history.steps[2].relative_error is not None and history.steps[2].relative_error < 1e-5
    sites = program.fact(structure)
    widths = {nodes.tensor_type(site.residual).shape[-1] for site in (*sites.attention, *sites.feed_forward)}
    assert widths == {8}


def test_magnitude_and_energy_are_sums_of_shares() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Embedding(7, 8), FeedForward(), nn.Linear(8, 3))), tokens(4, 9) % 7
    table, block, head = model
    with torch.no_grad():
        normed = block.norm(table(x)).flatten(0, 1)
        stream = block(table(x)).flatten(0, 1)

    def share(values: torch.Tensor) -> torch.Tensor:
        return values / values.sum()

    weights = [table.weight.T, block.down.weight, block.up.weight.T, head.weight.T]
    vectors = [block.norm.weight, block.norm.bias, block.down.bias]
    magnitude = sum(share(torch.tensor([float(row.norm()) ** 2 for row in item.detach()])) for item in weights)
    magnitude = magnitude + sum(share(item.detach() ** 2) if item.any() else 0 for item in vectors)
    up, last = block.up.weight.detach(), head.weight.detach()
    energy = share(torch.tensor([float((normed[:, c] ** 2).sum() * (up[:, c] ** 2).sum()) for c in range(8)]))
    energy = energy + share(torch.tensor([float((stream[:, c] ** 2).sum() * (last[:, c] ** 2).sum()) for c in range(8)]))
    for criterion, scores in (("magnitude", magnitude), ("energy", energy)):
        passes = f"prune-hidden{{keep=0.5,round_to=1,criterion={criterion},reconstruct=false}}"
        program, _ = Pipeline(parse_pipeline(passes, PASSES), data=[[x]], checks="off").run(captures.optimize(model, x).program)
        kept = program.weight("0.weight").any(0).nonzero().flatten().tolist()
        assert kept == sorted(scores.topk(4).indices.tolist())


@pytest.mark.parametrize("centred", [True, False])
def test_fit_is_ridge_regression(centred: bool) -> None:
    """Against a least-squares solver given the penalty as further rows; on noise, the largest λ is best on held-out tokens."""
    weight, x = normal(3, 6), normal(50, 6, seed=1) + 0.5
    y = x + 0.3 * normal(50, 6, seed=2)
    kept = torch.tensor([True, True, False, True, True, False])
    found, shift = fit(weight, [x[:20], x[20:]], [y[:20], y[20:]], kept, centred=centred)
    goal, given = (x @ weight.T).double(), y[:, kept].double()
    means = (goal.mean(0), given.mean(0)) if centred else (torch.zeros(3), torch.zeros(4))
    goal, given = goal - means[0], given - means[1]
    penalty = (0.01 * (given.square().sum(0).mean())).sqrt() * torch.eye(4, dtype=torch.float64)
    start = penalty @ weight[:, kept].T.double()  # the penalty is on the distance to the weights that stay
    wanted = torch.linalg.lstsq(torch.cat([given, penalty]), torch.cat([goal, start])).solution.T
    torch.testing.assert_close(found[:, kept].double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shift.double(), means[0].double() - wanted @ means[1].double(), rtol=1e-4, atol=1e-4)
    assert not found[:, ~kept].any()


def test_a_large_channel_does_not_damp_the_others() -> None:
    """One channel is a thousand times larger. Damped by a hundredth of the mean variance, the others would not be refitted."""
    weight, y = normal(3, 6), normal(400, 6, seed=1)
    y[:, 0] *= 1000
    x = y.clone()
    x[:, 5] = y[:, 1] + y[:, 2]  # the pruned channel follows from two that are kept
    kept = torch.tensor([True, True, True, True, True, False])
    found, _ = fit(weight, [x], [y], kept, centred=False)
    other = normal(100, 6, seed=2)
    other[:, 5] = other[:, 1] + other[:, 2]
    missed = lambda matrix: float((other @ (weight - matrix).T).norm())  # noqa: E731
    # λ is a millionth of a mean of 2e5 beside variances of 1: a sixth of the change is missing.
    assert missed(found) < 0.25 * missed(weight.masked_fill(~kept, 0))


def test_first_keeps_the_first_channels() -> None:
    model, x = seeded(lambda: nn.Sequential(nn.Linear(5, 8), FeedForward(), nn.Linear(8, 2))), normal(2, 3, 5)
    passes = "prune-hidden{keep=0.5,round_to=1,criterion=first,reconstruct=false}"
    program, _ = Pipeline(parse_pipeline(passes, PASSES), checks="off").run(captures.optimize(model, x).program)
    assert program.weight("0.weight").any(1).tolist() == [True] * 4 + [False] * 4


def test_reconstruction_lowers_the_error() -> None:
    data = batches(exact(tiny_llama))
    errors: dict[str, float] = {}
    for reconstruct in ("true", "false"):
        program, _ = pruned(tiny_llama, f"prune-hidden{{keep=0.5,reconstruct={reconstruct}}}")
        differences = [program.run(sample)[0] - exact(tiny_llama).run(sample)[0] for sample in data]  # pyright: ignore
        errors[reconstruct] = sum(float(item.detach().square().sum()) for item in differences)
    assert errors["true"] < errors["false"]


def test_rounding_decides_and_share_that_removes_none_is_refused() -> None:
    with pytest.raises(UnsupportedError) as refusal:
        pruned(tiny_llama, "prune-hidden{keep=0.8}")
    assert "removes none of the 16 channels of 'add" in str(refusal.value)
    assert str(refusal.value).endswith("rounded to multiples of 8; keep=0.5 or less is possible")
    with pytest.raises(UnsupportedError, match="prune-hidden takes keep= above 0 and below 1, and round_to= of 1 or more"):
        PruneHidden(keep=1.0)


class Waves(nn.Module):
    """Adds positions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.block = nn.Embedding(7, 8), FeedForward()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(ids.shape[1])[:, None] / torch.arange(1, 9)
        return self.block(self.table(ids) + torch.sin(angles + ids[..., None]))


def test_a_stream_something_else_writes_to_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="at zero: something that is no weight, such as computed positions, writes to"):
        rewrite(PruneHidden(0.5, 1, "magnitude", reconstruct=False), seeded(Waves), tokens() % 7)


def test_without_a_stream_or_without_data_it_says_so() -> None:
    with pytest.raises(UnsupportedError, match="prune-hidden finds no residual stream in this program"):
        rewrite(PruneHidden(0.5, 1, "magnitude", reconstruct=False), seeded(lambda: nn.Linear(8, 8)), normal(2, 5, 8))
    with pytest.raises(
        RequirementError, match="prune-hidden needs calibration data: pass data=, or choose criterion=magnitude"
    ):
        pruned(tiny_llama, "prune-hidden{keep=0.5}", data=False)


def test_composes() -> None:
    case = tiny_llama()
    passes = "prune-hidden{keep=0.5,criterion=magnitude,reconstruct=false},prune-layers{keep=0.5,criterion=magnitude}"
    fast = captures.compile(case.model, case.inputs, passes=passes)
    with torch.no_grad():
        assert fast(**case.kwargs).logits.shape == (2, 5, 37)
