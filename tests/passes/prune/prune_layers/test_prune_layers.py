"""Tests of prune-layers, with the models' own layers taken out by hand as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lissom.compiler.analysis.structure.branches import branch_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes import PASSES
from lissom.passes.prune.prune_layers.prune_layers import PruneLayers
from tests.support import captures
from tests.support.harness import aten, calls, check_golden, rewrite
from tests.support.models import VOCABULARY, Case, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.support.neighbours import all_but_slow

Build = Callable[[], Case]
LAYERS: dict[Build, Callable[[nn.Module], nn.ModuleList]] = {
    tiny_gpt2: lambda model: model.h,
    tiny_llama: lambda model: model.model.layers,
    tiny_bert: lambda model: model.encoder.layer,
    tiny_t5: lambda model: model.encoder.block,
}


def deep(layers: int = 4) -> Case:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=layers, n_head=2, n_positions=32, use_cache=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return Case(seeded(lambda: transformers.GPT2Model(config)), tiny_gpt2().inputs)


def albert() -> Case:
    """Two layers of the same weights, normed behind each sum."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return Case(seeded(lambda: transformers.AlbertModel(config)), tiny_bert().inputs)


def gemma() -> Case:
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=24, max_position_embeddings=32, sliding_window=3, pad_token_id=0, use_cache=False, bos_token_id=0,
        eos_token_id=0, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return Case(seeded(lambda: transformers.Gemma3ForCausalLM(config)), tiny_llama().inputs)


def neox() -> Case:
    """Attention and feed-forward in parallel."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, use_cache=False, use_parallel_residual=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Case(seeded(lambda: transformers.GPTNeoXModel(config)), tiny_llama().inputs)


@cache
def exact(build: Build) -> Program:
    case = build()
    return captures.optimize(case.model, case.inputs).program


def pruned(build: Build, passes: str, data: bool = True) -> tuple[Program, History]:
    program = exact(build)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    given = [{"input_ids": tokens(seed=seed), "attention_mask": mask} for seed in range(3)]
    flat = [program.signature.flatten((), inputs) for inputs in given]
    return Pipeline(parse_pipeline(passes, PASSES), samples=flat[:1], data=flat if data else ()).run(program)


def same(found: object, wanted: object) -> None:
    for one, other in zip(found.values(), wanted.values(), strict=True):  # pyright: ignore
        # Sums of some dozens of float32 products of order 1.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


class Layer(nn.Module):
    """A feed-forward with its norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Normed(Layer):
    """A feed-forward with its norm behind it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def test_rewrites() -> None:
    """Behind norms layers are passed by; the text of the others stays as it is."""
    model = seeded(lambda: nn.Sequential(Normed(), Normed()))
    _, history = rewrite(PruneLayers(keep=0.5, criterion="magnitude"), model, normal(2, 5, 8))
    check_golden("prune_layers", history.diff(0, 1))
    model = seeded(lambda: nn.Sequential(Layer(), Layer()))
    _, history = rewrite(PruneLayers(keep=0.5, criterion="magnitude"), model, normal(2, 5, 8))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].summary == "rewrote 1"


@pytest.mark.parametrize("build", LAYERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("criterion", ["influence", "magnitude", "linear-fit"])
def test_numbers(build: Build, criterion: str) -> None:
    """What is left answers as the model without that layer."""
    case = build()
    path = exact(build).fact(structure).layers[0].path
    program, _ = pruned(build, f"prune-layers{{keep=0.5,criterion={criterion},protect={path}}}")
    layers = LAYERS[build](case.model)
    if build is tiny_t5:
        # The first block holds the relative positions of all.
        layers[1] = Passed()
    else:
        del layers[1]
    case.model.config.num_hidden_layers = 1
    with torch.no_grad():
        same(program(**case.kwargs), case.model(**case.kwargs))


class Passed(nn.Module):
    def forward(self, hidden: torch.Tensor, mask: object, bias: object, *_: object, **__: object) -> tuple[object, ...]:
        return hidden, bias, None


@pytest.mark.parametrize(
    "build", all_but_slow([tiny_gpt2, tiny_llama, gemma, neox], tiny_gpt2, tiny_llama, neox), ids=lambda build: build.__name__
)
def test_what_is_zeroed_is_then_eliminated_exactly(build: Build) -> None:
    for part, gone in (("layer", 2), ("attention", 1), ("feed-forward", 1)):
        program, history = pruned(build, f"prune-layers{{keep=0.5,part={part}}},eliminate-dead")
        assert history.steps[1].summary == f"rewrote {gone}"
        assert history.steps[2].relative_error == 0
        found = program.fact(structure)
        assert (len(found.attention), len(found.feed_forward)) == {
            "layer": (1, 1), "attention": (1, 2), "feed-forward": (2, 1)
        }[part]  # fmt: skip


def test_layers_that_share_weights_are_passed_by() -> None:
    program, history = pruned(albert, "prune-layers{keep=0.5}")
    assert calls(program, aten.scaled_dot_product_attention.default) == 1
    assert history.steps[1].summary == "rewrote 2"


def residual_streams(layers: int) -> list[list[torch.Tensor]]:
    """Of real tokens, [tokens, features], before the first layer of `deep` and after each, for the data of `pruned`."""
    case, states = deep(layers), list[torch.Tensor]()
    for layer in case.model.h:
        layer.register_forward_hook(lambda _, args, out: states.append(out))
    case.model.h[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    found: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for seed in range(3):
            states.clear()
            case.model(input_ids=tokens(seed=seed), attention_mask=mask)
            found.append([state[mask != 0] for state in states])
    return found


def removed(program: Program, layers: int) -> set[int]:
    return {index for index in range(layers) if not program.weight(f"h.{index}.mlp.c_proj.weight").any()}


def test_influence_is_one_minus_the_cosine_over_real_tokens() -> None:
    """The order of removal is that of the scores, taken from the model's own hidden states."""
    scores = torch.zeros(4)
    for states in residual_streams(4):
        for index, (x, y) in enumerate(pairwise(states)):
            scores[index] += (1 - (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).sum()
    program, _ = pruned(deep, "prune-layers{keep=0.75}")
    assert removed(program, 4) == {int(scores.argmin())}


def test_linear_fit_removes_layers_of_least_linear_error() -> None:
    """By trying all of them, with NumPy's least squares, ridge regression as rows of their own."""
    first, seen, third = residual_streams(5)

    def error(start: int, stop: int) -> float:
        x, y = (torch.cat([first[index], third[index]]).double().numpy() for index in (start, stop))
        centre, mean = x.mean(0), y.mean(0)
        x, y = x - centre, y - mean
        ridge = np.sqrt(1e-3 * (x**2).sum(0).mean()) * np.eye(16)
        found = np.linalg.lstsq(np.vstack([x, ridge]), np.vstack([y, np.zeros((16, 16))]))[0]
        wanted = seen[stop].double().numpy() - mean
        missing = wanted - (seen[start].double().numpy() - centre) @ found
        return (missing**2).sum() / (wanted**2).sum()

    @cache
    def least(start: int, stop: int) -> float:
        """As one run, or in parts."""
        parts = (least(start, middle) + least(middle, stop) for middle in range(start + 1, stop))
        return min([error(start, stop), *parts])

    def cost(gone: tuple[int, ...]) -> float:
        edges = [index for index in range(6) if (index in gone) != (index - 1 in gone)]
        return sum(least(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True))

    for count in (1, 2, 3):
        ranked = sorted(combinations(range(5), count), key=cost)
        # The sums differ by more than a million times the rounding of float32.
        assert cost(ranked[1]) - cost(ranked[0]) > 1e-3
        program, _ = pruned(partial(deep, 5), f"prune-layers{{keep={1 - count / 5},criterion=linear-fit}}")
        assert removed(program, 5) == {*ranked[0]}


@pytest.mark.parametrize("part", ["attention", "feed-forward"])
def test_linear_fit_takes_parts_of_nonconsecutive_layers(part: str) -> None:
    _, history = pruned(deep, f"prune-layers{{keep=0.5,part={part},criterion=linear-fit}}")
    assert history.steps[1].summary == "rewrote 2"


def test_linear_fit_takes_one_batch() -> None:
    model = seeded(lambda: nn.Sequential(Normed(), Normed()))
    x = normal(2, 5, 8)
    program = captures.optimize(model, x, passes="prune-layers{keep=0.5,criterion=linear-fit}", data=[x]).program
    assert calls(program, aten.layer_norm.default) == 1


@pytest.mark.parametrize("build", LAYERS, ids=lambda build: build.__name__)
def test_branches(build: Build) -> None:
    """BERT norms behind its sums, the others before what they add."""
    found = exact(build).fact(structure)
    branches = [branch_of(site) for site in (*found.attention, *found.feed_forward)]
    assert [branch.post_norm for branch in branches] == [build is tiny_bert] * 4  # pyright: ignore


def test_excess_is_refused_with_place_reason_and_limit() -> None:
    with pytest.raises(UnsupportedError) as refusal:
        pruned(deep, 'prune-layers{keep=0.25,protect="h.0 h.2"}')
    assert str(refusal.value) == (
        "prune-layers{keep=0.25} has to remove 3 of 4 layers, but 'h.0' cannot go: it is protected, and 1 more stay too; "
        "keep=0.5 or more is possible"
    )


def test_too_little_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"prune-layers\{keep=0.9\} removes none of 2 layers, rounded; keep=0.5 removes"):
        pruned(tiny_gpt2, "prune-layers{keep=0.9}")
    with pytest.raises(UnsupportedError, match="above 0 and below 1, not keep=1"):
        PruneLayers(keep=1.0)


def test_a_program_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="prune-layers finds no layers in this program, so none can go"):
        rewrite(PruneLayers(), seeded(lambda: nn.Linear(8, 8)), normal(2, 5, 8))


@pytest.mark.parametrize("criterion", ["influence", "linear-fit"])
def test_without_data_it_says_so(criterion: str) -> None:
    message = rf"prune-layers\{{criterion={criterion}\}} needs calibration data: pass data=, or"
    with pytest.raises(RequirementError, match=message):
        pruned(tiny_gpt2, f"prune-layers{{keep=0.5,criterion={criterion}}}", data=False)


def test_composes() -> None:
    case = tiny_gpt2()
    passes = "prune-layers{keep=0.5,criterion=magnitude},eliminate-dead,sparsify{keep=0.5}"
    fast = captures.compile(case.model, case.inputs, passes=passes)
    with torch.no_grad():
        assert fast(**case.kwargs).last_hidden_state.shape == (2, 5, 16)


@pytest.mark.parametrize("before", ["low-rank{keep=0.9,whiten=false}", "quantize", "prune-hidden{keep=0.5}"])
def test_whole_layers_go_behind_lossy_passes(before: str) -> None:
    program, history = pruned(tiny_gpt2, f"{before},prune-layers{{keep=0.5}}")
    step = next(item for item in history.steps if item.spelling.startswith("prune-layers"))
    assert step.summary == "rewrote 2"
    program, _ = pruned(tiny_gpt2, f"{before},prune-layers{{keep=0.5}},eliminate-dead")
    found = program.fact(structure)
    assert (len(found.attention), len(found.feed_forward)) == (1, 1)


def test_a_single_layer_stays_with_a_note() -> None:
    program, history = pruned(partial(deep, 1), "prune-layers{keep=0.7},sparsify{keep=0.5}")
    assert "the only one of its layers stays" in history.steps[1].notes
    assert len(program.fact(structure).layers) == 1


class FirstToken(nn.Module):
    """An encoder whose last feed-forward matters for the first token only."""

    def __init__(self) -> None:
        super().__init__()
        self.model = deep(2).model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids).last_hidden_state[:, 0]


def test_layer_that_drops_tokens_inside_stays_with_reason() -> None:
    passes = "exact,eliminate-dead-tokens,prune-layers{keep=0.5}"
    found = captures.optimize(seeded(FirstToken), {"input_ids": tokens()}, passes=passes, data=[{"input_ids": tokens()}])
    assert len(found.program.fact(structure).layers) in (1, 2)
