"""The axes of whole programs, and the removal of their indices."""

import random
from functools import cache

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lissom.compiler.analysis.axes.axes import Axes, axes
from lissom.compiler.analysis.axes.axis import Axis
from lissom.compiler.analysis.structure.linear import input_of, is_attention, is_linear, weight_of
from lissom.compiler.analysis.structure.transformer import structure
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.program import Program
from lissom.compiler.ir.samples import Sample, check_samples
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.transforms.removal.indices import mask, remove_indices
from lissom.compiler.verify.divergence import TOLERANCE, compare, run_samples
from lissom.compiler.verify.structure import verify_structure
from lissom.errors import UnsupportedError
from lissom.frontends.capture.export import capture
from lissom.passes import PASSES, RECIPES
from tests.support.models import Case, seeded, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tokens
from tests.support.neighbours import all_but_slow

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}


def _bloom() -> Case:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=37)
    ids = tokens()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    return Case(seeded(lambda: transformers.BloomModel(config)), inputs)


def _deberta() -> Case:
    config = transformers.DebertaV2Config(
        **TINY, intermediate_size=48, relative_attention=True, pos_att_type="p2c|c2p", max_relative_positions=16
    )
    ids = tokens()
    return Case(seeded(lambda: transformers.DebertaV2Model(config)), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


MODELS = {
    "bert": tiny_bert,
    "llama": lambda: tiny_llama("eager"),
    "t5": tiny_t5,
    "gpt2": tiny_gpt2,
    "bloom": _bloom,
    "deberta": _deberta,
}


@cache
def canonical(name: str) -> tuple[Program, list[Sample]]:
    case = MODELS[name]()
    captured = capture(case.model, case.args, case.kwargs)
    samples = check_samples(captured.program.signature, captured.example)
    program, _ = Pipeline(parse_pipeline(RECIPES["exact"], PASSES), samples).run(captured.program)
    return program, samples


def removable(program: Program, found: Axes) -> dict[Axis, list[tuple[str, int]]]:
    """Axes that only linear layers sum over, with the weights (and their dimension) that do."""
    attended = {
        atom for node in program.nodes() if is_attention(node) for atom in found.axis(node.all_input_nodes[0], -1).atoms()
    }
    readers: dict[Axis, list[tuple[str, int]]] = {}
    for node in program.nodes():
        if not is_linear(node):
            continue
        weight = weight_of(node)
        dim = 1 if node.target is torch.ops.aten.linear.default else 0
        for atom in dict.fromkeys(found.axis(input_of(node), -1).atoms()):
            if not found.obstacle(atom) and atom not in attended:
                readers.setdefault(atom, []).append((str(weight.target), dim))
    return readers


@pytest.mark.parametrize("name", all_but_slow(MODELS, "llama"))
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_removing_indices_that_contribute_nothing_changes_no_output(name: str, seed: int):
    program, samples = canonical(name)
    before = program.copy()
    found = before.fact(axes)
    generator = random.Random(seed)
    chosen: dict[Axis, list[int]] = {}
    reads = {str(node.target): node for node in before.graph.nodes if node.op == "get_attr"}
    for axis, weights in removable(before, found).items():
        chosen[axis] = generator.sample(range(axis.size), generator.randrange(axis.size))
        kept = torch.ones(axis.size, dtype=torch.bool)
        kept[chosen[axis]] = False
        for weight, dim in weights:
            gone = (~mask(found.of[reads[weight]][dim], {axis: kept})).nonzero().flatten()
            zeroed = before.weight(weight).detach().index_fill(dim, gone, 0.0)
            before.set_weight(weight, nn.Parameter(zeroed))
    after = before.copy()
    matching = _same_axes(before, found, after, chosen)
    remove_indices(Editor(after, "remove"), matching)
    after.drop_dead()
    verify_structure(after)
    divergence = compare(run_samples(before, samples), run_samples(after, samples))
    # The removed terms were exact zeros; what is left is summed in another order.
    assert divergence.relative_error <= TOLERANCE[torch.float32]
    if any(chosen.values()):
        assert after.parameter_count < before.parameter_count


def _same_axes(before: Program, old: Axes, after: Program, chosen: dict[Axis, list[int]]) -> dict[Axis, list[int]]:
    """The axes of a copy that stand for those of the program it was copied from."""
    new = after.fact(axes)
    found = {}
    for left, right in zip(before.graph.nodes, after.graph.nodes, strict=True):
        for a, b in zip(old.of.get(left, ()), new.of.get(right, ()), strict=True):
            if isinstance(a, Axis):
                found.update(zip(a.atoms(), b.atoms(), strict=True))
    return {found[axis]: indices for axis, indices in chosen.items()}


def test_heads_are_one_axis_through_q_k_v_output():
    program, _ = canonical("bert")
    found, site = program.fact(axes), program.fact(structure).attention[0]
    heads = found.axis(site.node, 1)
    for projection in (*site.q, *site.k, *site.v):
        assert heads in set(found.axis(weight_of(projection), 0).atoms())
    assert heads in set(found.axis(weight_of(site.output), 1).atoms())


def test_query_heads_are_groups_times_heads_in_a_group():
    program, _ = canonical("llama")
    found, site = program.fact(axes), program.fact(structure).attention[0]
    groups, within = found.axis(site.node, 1).atoms()
    assert (groups.size, within.size) == (2, 2)
    assert groups in set(found.axis(weight_of(site.k[0]), 0).atoms())
    assert within not in set(found.axis(weight_of(site.k[0]), 0).atoms())


def test_rotary_halves_share_their_frequencies():
    program, _ = canonical("llama")
    found, site = program.fact(axes), program.fact(structure).attention[0]
    _, _, first, second = found.axis(weight_of(site.q[0]), 0).atoms()
    assert first is second


def test_occurrences_name_every_place_an_axis_is():
    program, _ = canonical("bert")
    found, site = program.fact(axes), program.fact(structure).feed_forward[0]
    width = found.axis(weight_of(site.down), 1)
    places = {place.node.name for place in found.occurrences(width)}
    assert {weight_of(site.down).name, weight_of(site.up[0]).name, site.up[0].name, site.activations[0].name} <= places


def test_operator_without_rule_pins_its_axes_and_is_named():
    class Unusual(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cdist(x, x)

    program = capture(Unusual(), (torch.randn(2, 3, 4),)).program
    reasons = {axis.pinned for axis in program.fact(axes).of[program.placeholders[0]]}
    assert any("no rule for" in reason for reason in reasons) or reasons == {"an input of the program"}


@pytest.mark.parametrize(
    ("pick", "indices", "sentence"),
    [
        (lambda p: p.fact(axes).axis(p.fact(structure).attention[0].node, 1), range(2), "all 2 indices of this axis would go"),
        (
            lambda p: p.fact(axes).axis(p.fact(structure).attention[0].node, 1),
            [4],
            "index 4 is outside this axis, which has 0 to 1",
        ),
        (lambda p: p.fact(axes).axis(p.fact(structure).norms[0], -1), [0], "cannot be removed: "),
        (lambda p: p.fact(axes).axis(p.placeholders[0], 0), [0], "indices of this axis of size batch cannot be removed: "),
    ],
)
def test_refusals_say_what_stands_in_the_way(pick, indices, sentence):
    program = canonical("bert")[0].copy()
    with pytest.raises(UnsupportedError, match=sentence.replace("(", r"\(")):
        remove_indices(Editor(program, "remove"), {pick(program): list(indices)})


class _Odd(nn.Module):
    """A slice that takes nothing, a norm that keeps its dimension, and an einsum with an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(x).relu()
        hidden = torch.cat((hidden[..., :16], hidden[..., 16:]), -1)
        hidden = hidden / (torch.linalg.vector_norm(hidden, 2, -1, keepdim=True) + 1)
        scores = torch.einsum("...td,...sd->...ts", hidden, hidden)
        return self.down(torch.einsum("...ts,...sd->...td", scores, hidden))


def test_empty_slices_norms_and_ellipses_have_axes():
    case = seeded(_Odd)
    captured = capture(case, (torch.randn(2, 5, 8),), {})
    samples = check_samples(captured.program.signature, captured.example)
    program = captured.program
    edit = Editor(program.copy(), "mask")
    down = next(node for node in edit.program.nodes(torch.ops.aten.linear.default) if "down" in str(node.args[1].target))
    weight = edit.program.weight(str(down.args[1].target)).detach().clone()
    weight[:, ::2] = 0
    edit.set_weight(down.args[1], weight)
    passes = parse_pipeline("eliminate-dead", PASSES)
    after, _ = Pipeline(passes, samples=samples).run(edit.program)
    verify_structure(after, edit.program)
    found = after.fact(axes)
    norm = after.nodes(torch.ops.aten.linalg_vector_norm.default)[0]
    assert [found.axis(norm, dim).size for dim in (-1,)] == [1]


class _Scalars(nn.Module):
    """Operators along dimension 0 of a tensor without dimensions, which PyTorch allows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate.softmax(0) + self.gate.cumsum(0) + self.gate.sum(0, keepdim=True) + self.gate.amax(0)
        return x * gate


def test_a_tensor_without_dimensions_has_no_axes():
    program = capture(_Scalars(), (torch.randn(2, 3),)).program
    assert all(
        program.fact(axes).of[node] == () for node in program.nodes(torch.ops.aten.softmax.int, torch.ops.aten.amax.default)
    )


class _Several(nn.Module):
    """An element-wise operator with two results, and operators that take the sizes of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.like = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mantissa, _ = torch.frexp(self.gain.expand_as(self.like))
        return x @ mantissa.reshape(24).reshape_as(self.like)


def test_sizes_of_another_tensor_are_its_axes():
    program = capture(_Several(), (torch.randn(2, 4),)).program
    found = program.fact(axes)
    reads = {str(node.target): node for node in program.graph.nodes if node.op == "get_attr"}
    (product,) = program.nodes(torch.ops.aten.matmul.default)
    assert found.axis(reads["like"], 0) is found.axis(reads["gain"], 0) is found.axis(product.args[1], 0)
    assert found.axis(reads["like"], 1) is found.axis(product.args[1], 1)
