"""Tests of quantize."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lissom.compiler.analysis.structure.matrix import RoundedMatrix, rounded_matrix_of
from lissom.compiler.calibration.observers import weight_scale
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.errors import RequirementError, UnsupportedError
from lissom.ops.formats import FORMATS
from lissom.ops.quantization import fake_quantize, fake_quantize_dynamic
from lissom.passes import PASSES
from lissom.passes.quantize.quantize import Quantize
from tests.support import captures
from tests.support.harness import capture_model, check_golden, rewrite
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, MIXTURES, mixture, program_of, samples, stacked_products, stacks
from tests.support.models import Case, FeedForward, normal, seeded, tiny_bert, tiny_gpt2, tiny_llama
from tests.support.sharding import decoder_program_of

aten = torch.ops.aten
SCHEMES = ("int8-dynamic", "int8-static", "int8-weight", "int4-weight", "fp8")


def test_golden() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    _, history = rewrite("quantize", module, torch.randn(2, 3, 8))
    check_golden("quantize", history.diff(0, 1))


def quantized(case: Case, passes: str) -> Program:
    return captures.optimize(case.model, case.inputs, passes=passes, data=[case.inputs]).program


def rounded_weights(program: Program) -> dict[str, torch.fx.Node]:
    return {str(node.args[0].target): node for node in program.nodes(fake_quantize) if node.args[0].op == "get_attr"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_llama])
def test_a_quantized_model_answers_nearly_as_before(make: type, scheme: str) -> None:
    case = make()
    group = ",group=8" if scheme.startswith("int4") else ""
    found = captures.optimize(case.model, case.inputs, passes=f"quantize{{scheme={scheme}{group}}}", data=[case.inputs])
    step = found.report.history.steps[-1]
    assert step.rewritten > 4
    assert step.cosine is not None
    assert 0.98 < step.cosine < 1


@pytest.mark.parametrize(("scheme", "least"), [("int8-group", 0.9999), ("int4-dynamic", 0.99)])
def test_activations_share_a_scale_by_groups(scheme: str, least: float) -> None:
    module, x = seeded(lambda: FeedForward(64, 128)), normal(2, 5, 64)
    found = captures.optimize(module, x, passes=f"quantize{{scheme={scheme},lm_head=true}}")
    cosine = found.report.history.steps[-1].cosine
    assert cosine is not None and least < cosine < 1
    rounded = found.program.nodes(fake_quantize_dynamic)
    assert [dict(node.kwargs) for node in rounded] == [{"format": "int8", "granularity": "group"}] * 2
    with pytest.raises(UnsupportedError, match="quantizes inputs of linear layers only"):
        Quantize(scheme=scheme, attention=True)  # pyright: ignore[reportArgumentType]


def test_auto_takes_groups_for_programs_with_a_cache() -> None:
    decoder, _ = decoder_program_of("llama")
    encoder = capture_model(tiny_bert().model, **tiny_bert().inputs).program
    for program, chosen, granularity in ((decoder, "int8-group", "group"), (encoder, "int8-dynamic", "token")):
        found, history = Pipeline(parse_pipeline("quantize{scheme=auto}", PASSES), checks="structural").run(program)
        assert {node.kwargs["granularity"] for node in found.nodes(fake_quantize_dynamic)} == {granularity}
        assert f"scheme=auto is {chosen} here" in history.steps[-1].notes


def test_layers_without_whole_groups_of_activations_are_left() -> None:
    found = captures.optimize(seeded(FeedForward), normal(2, 5, 8), passes="quantize{scheme=int8-group,lm_head=true}")
    reasons = {skip.reason for skip in found.report.history.steps[-1].skipped}
    why = "input features are no multiple of 32, of which activations share a scale"
    assert reasons == {f"its 8 {why}", f"its 12 {why}"}


def test_weights_and_activations_are_rounded_and_nothing_else() -> None:
    case = tiny_bert()
    program = quantized(case, "quantize")
    linears = program.nodes(aten.linear.default)
    inner = [node for node in linears if node.args[1].target is fake_quantize]
    assert len(inner) >= 12
    assert all(node.args[0].target is fake_quantize_dynamic for node in inner)
    readers = {reader for node in program.nodes(fake_quantize_dynamic) for reader in node.users}
    assert readers == set(inner)


def test_queries_keys_and_values_read_one_rounded_value() -> None:
    case = tiny_bert()
    values = quantized(case, "quantize").nodes(fake_quantize_dynamic)
    assert max(len(node.users) for node in values) == 3


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ("granularity=tensor", lambda o, i: (1, 1)),
        ("granularity=channel", lambda o, i: (o, 1)),
        ("granularity=group,group=8", lambda o, i: (o, i // 8)),
    ],
)
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2])
def test_scales_have_the_granularity_asked_for(make: type, options: str, shape: object) -> None:
    program = quantized(make(), f"quantize{{scheme=int8-weight,{options}}}")
    found = rounded_weights(program)
    assert found
    for name, node in found.items():
        weight, scale = program.weight(name), program.weight(str(node.args[1].target))
        # GPT-2 keeps its weights the other way round.
        turned = not name.endswith("weight") or any(user.target is not aten.linear.default for user in node.users)
        outputs, inputs = weight.shape[::-1] if turned else weight.shape
        wanted = shape(outputs, inputs)
        assert tuple(scale.shape) == (wanted[::-1] if turned else wanted)


def test_asymmetric_weights_have_zero_points_in_range() -> None:
    program = quantized(tiny_bert(), "quantize{scheme=int4-weight,group=8,symmetric=false}")
    for node in rounded_weights(program).values():
        zero_point = program.weight(str(node.args[2].target))
        assert node.kwargs["format"] == "uint4"
        assert zero_point.dtype == torch.uint8
        assert int(zero_point.max()) <= FORMATS["uint4"].high


def test_static_scales_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    data = [torch.full((2, 4), float(size)) for size in (1, 5)]
    program = captures.optimize(model, torch.ones(2, 4), passes="quantize{scheme=int8-static,lm_head=true}", data=data).program
    first = next(node for node in program.nodes(fake_quantize) if node.args[0].op == "placeholder")
    assert float(program.weight(str(first.args[1].target))) == pytest.approx(5 / 255)
    assert int(program.weight(str(first.args[2].target))) == 0


class Tied(nn.Module):
    """Looks words up, and scores them with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.gelu(self.mix(self.words(ids))), self.words.weight)


def test_tied_table_is_rounded_once_for_both_when_asked() -> None:
    ids = torch.tensor([[1, 2, 3]])
    plain = captures.optimize(Tied(), (ids,), passes="quantize{scheme=int8-weight}")
    assert list(rounded_weights(plain.program)) == ["mix.weight"]
    assert any("is an embedding table too" in skip.reason for skip in plain.report.history.steps[-1].skipped)
    both = captures.optimize(Tied(), (ids,), passes="quantize{scheme=int8-weight,embeddings=true}").program
    table = both.nodes(aten.embedding.default)[0].args[0]
    assert table.target is fake_quantize
    assert {user.target for user in table.users} == {aten.embedding.default, aten.linear.default}


def test_int4_weight_takes_a_tied_table_along_in_int8() -> None:
    ids = torch.tensor([[1, 2, 3]])
    found = captures.optimize(Tied(), (ids,), passes="quantize{scheme=int4-weight,group=8}").program
    formats = {name: node.kwargs["format"] for name, node in rounded_weights(found).items()}
    assert formats == {"mix.weight": "uint4", "words.weight": "int8"}
    table = found.nodes(aten.embedding.default)[0].args[0]
    assert table.target is fake_quantize and table.args[1].meta["val"].shape == (20, 1)
    without = captures.optimize(Tied(), (ids,), passes="quantize{scheme=int4-weight,group=8,embeddings=false}").program
    assert list(rounded_weights(without)) == ["mix.weight"]


def test_tied_table_stays_where_its_lookup_is_named() -> None:
    ids = torch.tensor([[1, 2, 3]])
    for options, formats in (("skip=words", {"mix.weight": "uint4"}), ("", {"mix.weight": "uint4", "words.weight": "uint8"})):
        passes = f"quantize{{scheme=int4-weight,group=8,symmetric=false{',' if options else ''}{options}}}"
        found = captures.optimize(Tied(), (ids,), passes=passes).program
        assert {name: node.kwargs["format"] for name, node in rounded_weights(found).items()} == formats


def test_layers_named_are_skipped_or_alone_treated() -> None:
    case = tiny_bert()
    every = len(rounded_weights(quantized(case, "quantize")))
    without = quantized(case, 'quantize{skip="encoder.layer.0"}')
    alone = quantized(case, 'quantize{only="encoder.layer.0"}')
    assert not any("layer.0" in name for name in rounded_weights(without))
    assert all("layer.0" in name for name in rounded_weights(alone))
    assert len(rounded_weights(without)) + len(rounded_weights(alone)) == every


def test_attention_and_residual_stream_are_rounded_when_asked() -> None:
    case = tiny_bert()
    program = quantized(case, "quantize{attention=true,residual=true}")
    attention = program.nodes(aten.scaled_dot_product_attention.default)
    assert all(item.target is fake_quantize_dynamic for node in attention for item in node.args[:3])
    norms = program.nodes(aten.layer_norm.default)
    assert sum(node.args[0].target is fake_quantize_dynamic for node in norms) == 2 * len(attention)


def test_a_second_pass_leaves_what_is_quantized() -> None:
    case = tiny_bert()
    passes = 'quantize{scheme=int8-weight,only="*.attention"},quantize{scheme=int4-weight,group=8}'
    found = captures.optimize(case.model, case.inputs, passes=passes)
    formats = {name: node.kwargs["format"] for name, node in rounded_weights(found.program).items()}
    assert all(form == ("int8" if ".attention." in name else "uint4") for name, form in formats.items())
    assert set(formats.values()) == {"int8", "uint4"}
    assert any("quantized already" in skip.reason for skip in found.report.history.steps[-1].skipped)


def test_it_trains_straight_through() -> None:
    case = tiny_bert()
    program = quantized(case, "quantize").own_copy()
    sample = program.signature.flatten((), case.kwargs)
    total = sum(item.float().square().sum() for item in program.run(sample) if isinstance(item, torch.Tensor))
    total.backward()
    trained = [program.weight(name) for name in rounded_weights(program)]
    reached = [weight for weight in trained if weight.grad is not None and float(weight.grad.abs().sum()) > 0]
    assert len(reached) >= len(trained) - 1  # the pooler may not be read


def test_pruning_behind_it_is_refused() -> None:
    case = tiny_bert()
    with pytest.raises(RequirementError, match="put this pass before the one that quantizes"):
        captures.optimize(case.model, case.inputs, passes="quantize,prune-heads{keep=0.5}")


def test_static_without_data_is_refused() -> None:
    case = tiny_bert()
    with pytest.raises(RequirementError, match=r"quantize\{scheme=int8-static\} needs calibration data"):
        captures.optimize(case.model, case.inputs, passes="quantize{scheme=int8-static}")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("quantize{group=0}", "group= of 1 or more"),
        ("quantize{fraction=0.2}", "fraction= above 0.5"),
        ("quantize{scheme=fp8,symmetric=false}", "has no zero points"),
        ("quantize{scheme=int8-weight,attention=true}", "quantizes weights only"),
        ("quantize{scheme=auto,attention=true}", "quantizes inputs of linear layers only"),
    ],
)
def test_options_that_make_no_sense_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(UnsupportedError, match=sentence):
        parse_pipeline(text, PASSES)


def test_a_width_no_group_divides_is_reported() -> None:
    found = captures.optimize(
        nn.Sequential(nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 8)),
        torch.ones(2, 12),
        passes=[Quantize("int4-weight", group=8)],
    )
    reasons = [skip.reason for skip in found.report.history.steps[-1].skipped]
    assert "its 12 input features are no multiple of group=8" in reasons


@pytest.mark.parametrize(("scheme", "groups"), [("int8-weight", 1), ("int4-weight", 32), ("int8-dynamic", 1), ("fp8", 1)])
@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_is_quantized_as_matrix_of_its_own(name: str, scheme: str, groups: int) -> None:
    before = stacks(program_of(name))
    found = captures.optimize(mixture(name), samples(1)[0], passes=f"quantize{{scheme={scheme}}}", checks="structural").program
    given = {node: rounded_matrix_of(node, stacks=True) for node in stacked_products(found)}
    assert [matrix.shape for matrix in given.values()] == [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    for matrix in given.values():
        form = FORMATS[str(matrix.quantizer.kwargs["format"])]
        scale, zero_point = matrix.read_scale(found)
        rows, columns = matrix.shape
        assert scale.shape == (EXPERTS, rows, 1 if groups == 1 else columns // groups)
        weights = before[matrix.name].mT if matrix.transposed else before[matrix.name]
        for expert, weight in enumerate(weights):
            size, point = weight_scale(weight, tuple(scale.shape[1:]), form, "auto")
            assert torch.equal(scale[expert], size.to(scale.dtype))
            assert zero_point is None or torch.equal(zero_point[expert].float(), point.float())
            wanted = fake_quantize(weight.contiguous(), size.to(scale.dtype), point, format=form.name)
            assert torch.equal(found_values(found, matrix)[expert], wanted)


def found_values(program: Program, matrix: RoundedMatrix) -> torch.Tensor:
    """The values of a quantized weight, [..., out_features, in_features]."""
    operands = [program.weight(str(item.target)).detach() for item in matrix.quantizer.all_input_nodes]
    values = fake_quantize(*operands, **matrix.quantizer.kwargs)
    return values.mT if matrix.transposed else values


def test_stack_has_scale_for_each_expert_at_least() -> None:
    found = captures.optimize(
        mixture("mixtral"), samples(1)[0], passes="quantize{scheme=int8-weight,granularity=tensor}", checks="structural"
    ).program
    scales = [rounded_matrix_of(node, stacks=True).read_scale(found)[0] for node in stacked_products(found)]
    assert [scale.shape for scale in scales] == [(EXPERTS, 1, 1)] * 2


def test_experts_are_named_by_their_module() -> None:
    (site,) = [item for item in Quantize.sites(program_of("gpt-oss")) if "down_proj" in item.path]
    assert site.size == HIDDEN
    passes = f'quantize{{scheme=int8-weight,schemes="*=none,{site.path}=int4-weight"}}'
    found = captures.optimize(mixture("gpt-oss"), samples(1)[0], passes=passes, checks="structural").program
    assert [str(node.kwargs["format"]) for node in rounded_weights(found).values()] == ["uint4"]
