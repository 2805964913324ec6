"""Tests of prune-experts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

import lissom
from lissom.compiler.analysis.structure.routed_experts import RoutedExperts, dropped_experts, routed_experts
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.transforms.experts import mask_experts
from lissom.errors import RequirementError, UnsupportedError
from lissom.passes.prune.prune_experts import PruneExperts, lowest, sums_by_expert
from tests.support import captures
from tests.support.harness import check_golden, every_backend, step_of
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, MIXTURES, mixture, program_of, samples, stacks
from tests.support.models import seeded
from tests.support.neighbours import all_but_slow

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "use_cache": False,
}
_LATENT: dict[str, Any] = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_LFM: dict[str, Any] = {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0, "use_expert_bias": True}
_GROUPED: dict[str, Any] = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
FAMILIES: Mapping[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: mixture(name) for name in MIXTURES},
    # Its weights are not normalized over the chosen experts.
    "olmoe": lambda: transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**_SIZES, num_experts=5)),
    "ernie": lambda: transformers.Ernie4_5_MoeForCausalLM(
        transformers.Ernie4_5_MoeConfig(**_SIZES, moe_num_experts=6, moe_k=2, moe_layer_start_index=0)
    ),
    "lfm2": lambda: transformers.Lfm2MoeForCausalLM(transformers.Lfm2MoeConfig(**_SIZES, **_LFM, num_experts=6)),
    "granite": lambda: transformers.GraniteMoeForCausalLM(
        transformers.GraniteMoeConfig(**{**_SIZES, "num_local_experts": 6}, logits_scaling=1.0)
    ),
    "deepseek-grouped": lambda: transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**_SIZES, **_LATENT, **_GROUPED)
    ),
}


def family(name: str) -> nn.Module:
    """A model whose matrices are large enough for its experts to count, and whose correction biases change the choice."""
    if name in MIXTURES:
        return mixture(name)
    model, generator = seeded(FAMILIES[name]), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    for bias in correction_biases(model).values():
        nn.init.normal_(bias, std=0.1, generator=generator)
    return model


def correction_biases(model: nn.Module) -> dict[str, torch.Tensor]:
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.data for name, value in everything.items() if name.endswith(("correction_bias", "expert_bias"))}


def routers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the routers by name, [experts, features]."""
    wanted = (".gate.weight", ".router.weight", ".router.layer.weight")
    return {name: value for name, value in model.named_parameters() if name.endswith(wanted) and value.dim() == 2}


def dropped_in(program: Program, model: nn.Module) -> dict[str, list[int]]:
    """The experts of each router of a model whose rows a program has lost."""
    weights = program.weights()
    return {
        name: [row for row in range(len(weight)) if not bool((weights[name] == weight[row]).all(1).any())]
        for name, weight in routers(model).items()
    }


@contextmanager
def masked(model: nn.Module, dropped: Mapping[str, Sequence[int]]) -> Generator[None]:
    """The model with scores of -inf for these experts, until the block ends."""
    by_weight = {id(weight): dropped[name] for name, weight in routers(model).items()}
    plain, biases = functional.linear, correction_biases(model)
    before = {name: bias.clone() for name, bias in biases.items()}

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        return plain(x, weight, *rest).index_fill(-1, torch.tensor(by_weight.get(id(weight), []), dtype=torch.long), -torch.inf)

    for (_, bias), gone in zip(sorted(biases.items()), [dropped[name] for name in sorted(dropped)], strict=False):
        bias[..., gone] = -torch.inf
    with mock.patch.object(functional, "linear", linear):
        yield
    for name, bias in biases.items():
        bias.copy_(before[name])


@pytest.mark.parametrize("name", all_but_slow(FAMILIES, "mixtral"))
def test_equal_to_the_model_with_masked_experts(name: str) -> None:
    model, data = family(name), samples()
    found = captures.optimize(model, data[0], passes="prune-experts{keep=0.75}", data=data)
    dropped = dropped_in(found.program, model)
    assert dropped and all(dropped.values())
    with torch.no_grad(), masked(model, dropped):
        wanted = model(**data[1]).logits
    assert not torch.allclose(wanted, model(**data[1]).logits, atol=1e-2)
    given = found.program.run(list(data[1].values()))[0]
    # The same float32 products, some in another order; logits are of size 10.
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    assert all(
        len(stack) == len(routers(model)[router]) - len(gone)
        for stack in stacks(found.program).values()
        for router, gone in dropped.items()
    )


@pytest.mark.slow
def test_rewrites() -> None:
    data = samples()
    history = captures.optimize(mixture("deepseek-v3"), data[0], passes="prune-experts{keep=0.75}", data=data).report.history
    pruned, removed = step_of(history, "prune-experts"), step_of(history, "eliminate-dead")
    lines = [f"{step.spelling}: {step.summary}\n{history.diff(step.index - 1, step.index)}" for step in (pruned, removed)]
    check_golden("prune_experts", "\n".join(lines))


def saliency(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The definition, token by token, for the only layer of a Mixtral model."""
    layer = model.model.layers[0].mlp
    read: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: read.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    norms: list[list[float]] = [[] for _ in range(EXPERTS)]
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    for x in read[0][real].double():
        weights = (layer.gate.weight.double() @ x).softmax(0)
        chosen = sorted(range(EXPERTS), key=lambda expert: -float(weights[expert]))[:2]
        for expert in chosen:
            gate, up = (layer.experts.gate_up_proj[expert].double() @ x).chunk(2)
            output = layer.experts.down_proj[expert].double() @ (gate * gate.sigmoid() * up)
            norms[expert].append(float(weights[expert] / weights[chosen].sum() * output.norm()))
    return torch.tensor([sum(values) / max(len(values), 1) for values in norms], dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("padding", all_but_slow([0, 5], 0))
def test_numbers(padding: int) -> None:
    model, data = mixture("mixtral"), samples(1, length=17)
    mask = torch.ones_like(data[0]["input_ids"])
    mask[1, 17 - padding :] = 0
    data[0]["attention_mask"] = mask
    wanted = saliency(model, data[0])
    for kept in (3, 2):
        found = captures.optimize(model, data[0], passes=f'prune-experts{{amounts="*={kept}"}}', data=data, checks="structural")
        (gone,) = dropped_in(found.program, model).values()
        assert set(gone) == set(wanted.argsort()[: EXPERTS - kept].tolist())


def test_sums_by_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    ids, outputs = torch.tensor([0, 0, 2, 3, 3]), torch.randn(5, 7, generator=generator)
    norms, counts = sums_by_expert(ids, outputs, 5)
    rows = [
        [float(outputs[row].double().square().sum().sqrt()) for row in range(5) if ids[row] == expert] for expert in range(5)
    ]
    # Sums of at most two numbers in float64.
    torch.testing.assert_close(norms, torch.tensor([sum(row) for row in rows], dtype=torch.float64), rtol=1e-12, atol=0)
    assert counts.tolist() == [2, 0, 1, 2, 0]


def test_lowest_scores_of_each_group() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0], [5.0, 7.0, 7.0, 7.0]])
    assert lowest(scores, 2).tolist() == [[False, True, False, True], [True, False, False, True]]


@pytest.mark.slow
def test_groups_lose_as_many_experts_each() -> None:
    data, model = samples(), family("deepseek-grouped")
    found = captures.optimize(model, data[0], passes="prune-experts{keep=0.5}", data=data)
    for gone in dropped_in(found.program, model).values():
        assert [sum(expert // 4 == group for expert in gone) for group in range(2)] == [2, 2]


def test_frequency_counts_tokens() -> None:
    data, model = samples(1), mixture("mixtral")
    chosen: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output[-1]))
    model(**data[0])
    hook.remove()
    counts = chosen[0].flatten().bincount(minlength=EXPERTS)
    found = captures.optimize(model, data[0], passes="prune-experts{keep=0.75,criterion=frequency}", data=data)
    (gone,) = dropped_in(found.program, model).values()
    assert len(gone) == 1 and counts[gone[0]] == counts.min()


def test_experts_without_tokens_go_first() -> None:
    model, data = mixture("mixtral"), [{"input_ids": torch.tensor([[5]])}]
    found = captures.optimize(model, samples()[0], passes="prune-experts{keep=0.5}", data=data, checks="structural")
    with torch.no_grad():
        wanted = model(**data[0]).logits
    torch.testing.assert_close(found.program.run([data[0]["input_ids"]])[0], wanted, rtol=1e-4, atol=1e-4)


def test_leaves_other_programs_alone() -> None:
    plain = captures.optimize(nn.Linear(3, 5), torch.randn(2, 3), passes=[PruneExperts(keep=0.5)], data=[torch.randn(2, 3)])
    assert plain.report.history.diff(0, len(plain.report.history.steps) - 1) == ""


def test_amounts_protect_and_the_chosen_amounts() -> None:
    data, model = samples(), family("olmoe")
    passes = 'prune-experts{keep=0.8,amounts="model.layers.1=3"}'
    found = captures.optimize(model, data[0], passes=passes, data=data, checks="structural")
    assert [len(gone) for gone in dropped_in(found.program, model).values()] == [1, 2]
    text = step_of(found.report.history, "prune-experts").per_site
    assert text == 'prune-experts{amounts="model.layers.0.mlp.gate=4,model.layers.1.mlp.gate=3"}'
    passes = "prune-experts{keep=0.4,protect=model.layers.0}"
    found = captures.optimize(model, data[0], passes=passes, data=data, checks="structural")
    assert [len(gone) for gone in dropped_in(found.program, model).values()] == [0, 3]


def test_sites() -> None:
    (site,) = PruneExperts.sites(program_of("mixtral"))
    assert (site.kind, site.path, site.size, site.takes) == (
        "experts",
        "model.layers.0.mlp.gate",
        4,
        {"prune-experts": range(2, 5)},
    )


def test_requirements() -> None:
    data, model = samples(), mixture("mixtral")
    with pytest.raises(RequirementError, match="needs calibration data, whose tokens it routes to the experts: pass data="):
        captures.optimize(model, data[0], passes="prune-experts{keep=0.75}")
    with pytest.raises(UnsupportedError, match="was given neither: write for example"):
        PruneExperts()
    with pytest.raises(UnsupportedError, match=r"keep= above 0 and up to 1, and was given 1\.5"):
        PruneExperts(keep=1.5)
    with pytest.raises(
        UnsupportedError, match=r"leaves 'model.layers.0.mlp.gate' 1 of 4 experts, and its router needs 2; give"
    ):
        captures.optimize(model, data[0], passes="prune-experts{keep=0.25}", data=data)
    with pytest.raises(
        UnsupportedError, match=r"has 4 experts, and cannot have 1; give 2, 3, 4|has 4 experts, and cannot have 1"
    ):
        captures.optimize(model, data[0], passes='prune-experts{amounts="*=1"}', data=data)
    with pytest.raises(UnsupportedError, match=r"2 groups, and its router needs 2; give keep=0\.5 or more"):
        captures.optimize(family("deepseek-grouped"), data[0], passes="prune-experts{keep=0.25}", data=data)


def test_returned_scores_keep_all_experts() -> None:
    data = [{**sample, "output_router_logits": True} for sample in samples()]
    found = captures.optimize(mixture("mixtral"), data[0], passes="prune-experts{keep=0.5}", data=data, checks="structural")
    reasons = [skip.reason for skip in step_of(found.report.history, "prune-experts").skipped]
    # The auxiliary loss's statistics may come first.
    assert len(reasons) == 1 and reasons[0].startswith("all experts stay: ") and "its scores" in reasons[0]
    assert {len(stack) for stack in stacks(found.program).values()} == {EXPERTS}


def test_a_fraction_that_rounds_to_all_experts_is_reported() -> None:
    data = samples()
    program = captures.optimize(family("deepseek-grouped"), data[0], checks="structural").program.copy()
    found = lissom.optimize(program, data[0], passes="prune-experts{keep=0.9}", data=data, checks="structural")
    step = step_of(found.report.history, "prune-experts")
    reason = "all experts stay: keep=0.9 of 4 in each of 2 groups rounds to 4; give keep=0.75 or less"
    assert {skip.reason for skip in step.skipped} == {reason}
    named = 'prune-experts{keep=0.9,protect="*"}'
    found = lissom.optimize(program, data[0], passes=named, data=data, checks="structural")
    assert not step_of(found.report.history, "prune-experts").skipped


def test_unequal_groups_stay() -> None:
    data = samples()
    program = captures.optimize(family("deepseek-grouped"), data[0], checks="structural").program.copy()
    site = next(site for _, site in program.fact(routed_experts) if isinstance(site, RoutedExperts))
    dropped = torch.arange(8) < 2
    mask_experts(Editor(program, "test"), site, dropped)
    found = lissom.optimize(program, data[0], passes="eliminate-dead", checks="structural")
    step = step_of(found.report.history, "eliminate-dead")
    assert [skip.reason for skip in step.skipped] == ["dropped experts stay: its 2 groups have 2, 4 experts left"]
    masks = [
        dropped_experts(found.program, site).tolist()
        for _, site in found.program.fact(routed_experts)
        if not isinstance(site, str)
    ]
    assert masks[0] == dropped.tolist()


@every_backend
def test_composes(backend: Any) -> None:
    data, model = samples(), mixture("qwen3-moe")
    passes = "prune-experts{keep=0.75},quantize{scheme=int8-weight}"
    compiled = captures.compile(model, data[0], passes=passes, data=data, backend=backend, simulate=backend.name != "eager")
    pruned = captures.optimize(model, data[0], passes="prune-experts{keep=0.75}", data=data).program
    wanted = pruned.run(list(data[1].values()))[0]
    # The weights are rounded to 8 bits, and so are the router's: a few tokens may reach another expert.
    assert torch.cosine_similarity(compiled(**data[1]).logits.flatten(), wanted.flatten(), 0) > 0.99
