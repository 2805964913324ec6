"""Amounts per site: what passes do with them, the text of what a pass chose, and the sites of a program."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lissom
from lissom.compiler.analysis.amounts import AmountSite, amounts_text
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import format_pass, parse_pipeline
from lissom.compiler.verify.divergence import run_samples
from lissom.errors import UnsupportedError
from lissom.inspect.sites import amounts_table
from lissom.inspect.tables import plain
from lissom.passes import PASSES, RECIPES
from tests.support.dead_structure import program_of
from tests.support.models import Case, normal, seeded
from tools.fuzz.models import Spec, build, draw_inputs, draw_spec
from tools.zoo import catalogue
from tools.zoo.removal import canonical

EXAMPLES = settings().max_examples // 4
CHOSEN = {
    "bert": (
        "prune-heads{keep=0.5}",
        "prune-neurons{keep=0.5,criterion=magnitude,round_to=2}",
        "prune-neurons{keep=0.5,criterion=reconstruction}",
        "prune-layers{keep=0.5}",
        "prune-hidden{keep=0.5}",
        "sparsify{scope=global}",
        "sparsify{pattern=2:4,criterion=wanda,protect=encoder.layer.0}",
        "low-rank{budget=0.5}",
        "low-rank{keep=0.6,only=*.query}",
        "quantize",
        "quantize{scheme=int8-static,skip=*.value}",
        "sparsify-attention{window=2}",
        "sparsify-attention{pattern=measured,block=2}",
        "pool-heads{keep=0.5}",
    ),
    "llama": ("prune-heads{keep=0.5}", "prune-neurons{keep=0.5}", "pool-heads{groups=1}", "low-rank{rank=3}"),
    "t5": ("prune-heads{keep=0.5}", "prune-layers{keep=0.5,part=attention}"),
    "gpt2": ("prune-neurons{keep=0.3,criterion=magnitude}", "quantize{scheme=int8-weight}"),
}


def run(passes: str, name: str) -> tuple[Program, History]:
    program, samples = program_of(name)
    data = samples * 2
    return Pipeline(parse_pipeline(passes, PASSES, RECIPES), checks="structural", data=data).run(program)


def same_numbers(one: Program, other: Program) -> bool:
    first, second = one.weights(), other.weights()
    return one.text() == other.text() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("model", "passes"), [(model, text) for model, texts in CHOSEN.items() for text in texts])
def test_chosen_amounts_can_be_written_down_and_rerun(model: str, passes: str) -> None:
    program, history = run(passes, model)
    written = history.steps[-1].per_site
    (item,) = parse_pipeline(written, PASSES)
    assert format_pass(item) == written
    again, repeated = run(written, model)
    assert same_numbers(program, again)
    assert repeated.steps[-1].per_site == written
    assert History.from_json(history.to_json(), history.texts).steps == history.steps


def sizes(program: Program, kind: str) -> dict[str, int]:
    return {site.path: site.size for site in lissom.sites(program) if site.kind == kind}


def test_named_sites_get_their_amount_and_others_stay() -> None:
    after, _ = run('prune-neurons{amounts="encoder.layer.1=0.25"},eliminate-dead', "bert")
    assert sizes(after, "neurons") == {"encoder.layer.0.output.dense": 24, "encoder.layer.1.output.dense": 6}
    after, _ = run('prune-heads{amounts="*.0=1"},eliminate-dead', "gpt2")
    assert sizes(after, "heads") == {"h.0.attn": 1, "h.1.attn": 2}


def test_keep_is_met_by_the_sites_without_an_amount() -> None:
    after, _ = run('prune-neurons{keep=0.5,amounts="encoder.layer.1=none"},eliminate-dead', "bert")
    assert sizes(after, "neurons") == {"encoder.layer.0.output.dense": 12, "encoder.layer.1.output.dense": 24}


def test_layers_are_removed_by_name_without_data() -> None:
    program, _ = program_of("bert")
    after, _ = Pipeline(parse_pipeline('prune-layers{amounts="encoder.layer.1=0"}', PASSES), checks="off").run(program)
    assert sizes(after, "layer") == {"encoder.layer.0": 1}


def test_streams_are_narrowed_by_name() -> None:
    after, _ = run('prune-hidden{amounts="encoder=10"},eliminate-dead', "bert")
    assert set(sizes(after, "channels").values()) == {10}


def test_layers_get_ranks_and_schemes_of_their_own() -> None:
    after, history = run('low-rank{amounts="*.query=3,encoder.layer.0.output=0.5"}', "bert")
    shapes = {name: tuple(weight.shape) for name, weight in after.weights().items() if name.endswith("_v")}
    assert {name: shape[0] for name, shape in shapes.items()} == {
        "encoder.layer.0.attention.self.query.weight_v": 3,
        "encoder.layer.1.attention.self.query.weight_v": 3,
        # Half of 16 · 24 elements, with 16 + 24 for each rank.
        "encoder.layer.0.output.dense.weight_v": 4,
    }
    assert {skip.reason for skip in history.steps[-1].skipped} >= {"amounts= does not name it"}
    after, _ = run('quantize{schemes="*=none,encoder.layer.0=int8-weight,*.query=int8-dynamic"}', "bert")
    scales = {name for name in after.weights() if name.endswith("_scale")}
    assert len(scales) == 7 and "encoder.layer.1.attention.self.query.weight_scale" in scales
    # Both layers' queries: their pattern names fewer layers than the other.
    assert after.text().count("lissom.fake_quantize_dynamic") == 2


def test_attentions_get_patterns_of_their_own() -> None:
    mixed, _ = run('sparsify-attention{patterns="*.0=window:1,*.1=block:2"}', "bert")
    apart = 'sparsify-attention{window=1,only="*.0"},sparsify-attention{pattern=block,block=2,only="*.1"}'
    two, _ = run(apart, "bert")
    _, samples = program_of("bert")
    assert all(torch.equal(*pair) for pair in zip(*(run_samples(item, samples)[0] for item in (mixed, two)), strict=True))


def test_convolutions_get_terms_of_their_own() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)))
    x, passes = normal(2, 3, 8, 8), 'depthwise-separable{order=pointwise-first,amounts="2=2"}'
    program = lissom.optimize(model, x).program
    assert sizes(program, "convolution") == {"0": 9, "2": 9}
    found = lissom.optimize(program, x, passes=passes)
    assert {name: tuple(item.shape) for name, item in found.program.weights().items() if "wise" in name} == {
        "2.weight_pointwise": (32, 16, 1, 1),
        "2.weight_depthwise": (16, 2, 3, 3),
    }
    assert next(step.per_site for step in found.report.history.steps if step.per_site) == passes
    with pytest.raises(UnsupportedError, match="'2' has up to 9 terms, and cannot have 10; give 1 to 9, or a fraction"):
        lissom.optimize(program, x, passes=passes.replace("2=2", "2=10"))


@pytest.mark.parametrize(
    ("model", "passes", "message"),
    [
        ("bert", 'prune-heads{amounts="encoder.layer.0=3"}', "has 2 heads, and cannot have 3; give 1, 2, or a fraction"),
        ("bert", 'prune-neurons{amounts="decoder=3"}', r"'decoder' matches none of the sites with neurons; there are enc"),
        ("bert", 'pool-heads{amounts="*=3"}', "has 2 key/value heads, and cannot have 3; give 1, 2"),
        ("bert", 'prune-layers{amounts="*=0"}', "removes all 2 layers; one has to stay"),
        ("bert", 'prune-layers{amounts="*.0=0",protect="*.0"}', "'encoder.layer.0' cannot go: it is protected"),
        ("bert", 'low-rank{amounts="*.query=17"}', "is 16 × 16, with full rank 16, and cannot have rank 17; give 1 to 16"),
        ("bert", 'sparsify{amounts="*.query=2:5"}', "cannot have 2:5: its 16 input features are no multiple of 5"),
        ("bert", 'quantize{schemes="pooled=fp8"}', "'pooled' matches none of the linear layers; did you mean 'pooler.dense'"),
        ("t5", 'prune-hidden{amounts="decoder=8"}', r"matches none of the residual streams; there are enc.* \(16 channels\)"),
    ],
)
def test_amounts_that_a_program_cannot_have(model: str, passes: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        run(passes, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune-heads", r"prune-heads takes keep=.* or amounts=.* given neither: write for example prune-heads\{keep=0.75\}"),
        ('prune-layers{amounts="*.0=2"}', "an amount is 0 for a layer that goes, 1 for one that stays, or none"),
        ('quantize{schemes="*=int3"}', "an amount is one of int8-dynamic, .*, or none"),
        ('quantize{schemes="*=fp8",residual=true}', "names layers: leave out attention= and residual="),
        ('sparsify{amounts="*=3"}', "an amount is a fraction such as 0.5, a pattern such as 2:4, or none"),
        ('sparsify-attention{patterns="*=round:3"}', r"an amount is window, .*, each alone or with a number as in window:64"),
        ('sparsify-attention{patterns="*=block",stride=3}', "has no use for stride="),
        ('low-rank{amounts="*=3",attention=true}', "amounts= names linear layers only"),
    ],
)
def test_options_that_are_no_amounts(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_pipeline(text, PASSES)


@cache
def drawn_program(number: int) -> Program:
    generator = random.Random(f"amounts {number}")
    spec: Spec = draw_spec(generator)
    program, _ = canonical(Case(build(spec), {**draw_inputs(spec, 2, 5, "right", 0)}))
    return program


def draw_amounts(name: str, found: list[AmountSite], generator: random.Random) -> list[object]:
    """A legal amount for each site, or None. Fractions are for `sparsify`, which has no numbers."""
    legal = [[item for item in site.takes[name] if item != "a fraction"] for site in found]
    return [generator.choice([None, *items]) for items in legal]


@settings(max_examples=EXAMPLES)
@given(number=st.integers(0, 2), seed=st.integers(0, 1 << 30))
def test_any_legal_amounts_are_met(number: int, seed: int) -> None:
    program, generator = drawn_program(number), random.Random(seed)
    found = lissom.sites(program)
    name, kind = generator.choice((("prune-heads", "heads"), ("prune-neurons", "neurons")))
    counted = [site for site in found if site.kind == kind]
    amounts = draw_amounts(name, counted, generator)
    text = amounts_text(counted, amounts)
    if not text:
        return
    passes = f'{name}{{amounts="{text}",criterion=magnitude}}'
    after, history = Pipeline(parse_pipeline(passes, PASSES), checks="off").run(program)
    fewer = amounts_text(
        counted, [amount if amount != site.size else None for site, amount in zip(counted, amounts, strict=True)]
    )
    if not fewer:
        assert not history.steps[-1].per_site
        return
    wanted = parse_pipeline(f'{name}{{amounts="{fewer}",criterion=magnitude}}', PASSES)
    assert history.steps[-1].per_site == format_pass(wanted[0])
    assert same_numbers(after, Pipeline(parse_pipeline(history.steps[-1].per_site, PASSES), checks="off").run(program)[0])


@settings(max_examples=EXAMPLES)
@given(number=st.integers(0, 2), seed=st.integers(0, 1 << 30))
def test_any_legal_amount_is_taken_by_every_pass(number: int, seed: int) -> None:
    program, generator = drawn_program(number), random.Random(seed)
    by_pass: dict[str, list[AmountSite]] = {}
    for site in lissom.sites(program):
        for name in site.takes:
            by_pass.setdefault(name, []).append(site)
    text = generator.choice(sorted(by_pass))
    option = {"quantize": "schemes", "sparsify-attention": "patterns"}.get(text.partition("{")[0], "amounts")
    amounts = draw_amounts(text, by_pass[text], generator)
    if text.startswith("prune-layers"):
        amounts = [None if amount == 0 and index else amount for index, amount in enumerate(amounts)]
    written = amounts_text(by_pass[text], [None if amount in ("int8-static", "measured") else amount for amount in amounts])
    options = [f'{option}="{written}"', *([text[text.index("{") + 1 : -1]] if "{" in text else [])]
    options += {"prune-hidden": ["criterion=magnitude", "reconstruct=false"], "prune-heads": ["criterion=magnitude"]}.get(
        text, []
    )
    if written and not (text.startswith("prune-layers") and len(by_pass[text]) == 1):
        Pipeline(parse_pipeline(f"{text.partition('{')[0]}{{{','.join(options)}}}", PASSES), checks="off").run(program)


@pytest.mark.parametrize("model", ["bert", "llama", "t5", "gpt2"])
def test_every_kind_of_site_is_listed_once(model: str) -> None:
    program, _ = program_of(model)
    found = lissom.sites(program)
    assert {"heads", "neurons", "layer", "channels", "linear", "key/value heads", "attention"} <= {site.kind for site in found}
    assert len({(site.kind, site.path) for site in found}) == len(found)
    table = plain(amounts_table(program, found))
    assert "prune-heads: 1, 2" in table and "×2" in table


def test_quantized_program_sites_are_those_passes_still_take() -> None:
    after, _ = run("quantize", "bert")
    assert {name for site in lissom.sites(after) for name in site.takes} == {
        *("low-rank{lm_head=true}", "quantize{lm_head=true}", "quantize{embeddings=true}", "sparsify-attention"),
        *("prune-layers", "prune-layers{part=attention}", "prune-layers{part=feed-forward}"),
    }


def test_experts_and_shared_layers_are_sites() -> None:
    spec = Spec(layers=2, experts=2, shared_layers=True)
    program, _ = canonical(Case(build(spec), {**draw_inputs(spec, 2, 5, "none", 0)}))
    found = [site for site in lissom.sites(program) if site.kind == "neurons"]
    assert found and all(site.size == spec.neurons for site in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("causal/qwen3_moe", "heads, key/value heads, layer, linear, channels, attention"),
        ("masked/albert", "heads, neurons, layer, linear, channels, attention, embedding"),
        ("encoder-decoder/bart", "heads, neurons, key/value heads, layer, linear, channels, attention, embedding"),
        ("vision/swinv2", "heads, neurons, key/value heads, layer, linear, channels, attention, convolution"),
        ("vision/resnet", "linear, convolution"),
        ("hand-written/multi-query", "heads, neurons, layer, linear, channels, attention"),
    ],
)
def test_the_sites_of_every_family(name: str, kinds: str) -> None:
    entry = next(entry for entry in catalogue.entries() if entry.name == name)
    found = lissom.sites(canonical(entry.build())[0])
    assert {*kinds.split(", ")} <= {site.kind for site in found}
    assert all(site.path and site.size > 0 and site.takes for site in found)
    assert len({(site.kind, site.path) for site in found}) == len(found)
