"""Tests of passes on mixtures of experts: each changes the stacked weights, or says that it leaves them."""

from __future__ import annotations

import math

import pytest
import torch

from lissom.compiler.analysis.structure.linear import weight_of, weight_path
from lissom.compiler.ir import node as nodes
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.errors import LissomError
from tests.support import captures
from tests.support.harness import step_of
from tests.support.mixtures import EXPERTS, HIDDEN, INNER, MIXTURES, mixture, program_of, samples, stacked_products, stacks
from tests.support.models import seeded

aten = torch.ops.aten

PASSES = (
    "cast{dtype=bf16}",
    "cast{dtype=fp16}",
    *(f"quantize{{scheme={scheme}}}" for scheme in ("int8-dynamic", "int8-static", "int8-weight", "int4-weight", "fp8")),
    "quantize{scheme=int4-weight},gptq",
    "quantize{scheme=int8-weight},correct-bias",
    *(f"sparsify{{keep=0.5,criterion={criterion}}}" for criterion in ("magnitude", "wanda", "sparsegpt")),
    "low-rank{keep=0.5}",
)
"""Passes that change the weights of every linear layer."""
# Stacks are [experts, out_features, in_features] in Mixtral, the other way round and with biases in GPT-OSS. The other two have
# stacks as Mixtral does, in other surroundings: one pass of each kind says whether they are found.
OF_EACH_KIND = ("cast{dtype=bf16}", "quantize{scheme=int8-dynamic}", "sparsify{keep=0.5,criterion=wanda}", "low-rank{keep=0.5}")


@pytest.mark.parametrize(
    ("name", "passes"),
    [(name, passes) for name in MIXTURES for passes in (PASSES if name in ("mixtral", "gpt-oss") else OF_EACH_KIND)],
)
def test_every_stack_is_changed_or_its_product_named(name: str, passes: str) -> None:
    data = samples()
    found = captures.optimize(mixture(name), data[0], passes=passes, data=data, checks="structural")
    before = program_of(name)
    step: Step = found.report.history.steps[-1]
    named = {item.node for item in step.skipped}
    for product, old, new in zip(stacked_products(found.program), weights(before), weights(found.program), strict=True):
        changed = old.shape != new.shape or old.dtype != new.dtype or not torch.equal(old, new)
        assert changed or product.name in named


def weights(program: Program) -> list[torch.Tensor]:
    """The stacked weight of each product, quantized where it is."""
    found: list[torch.Tensor] = []
    for product in stacked_products(program):
        weight = weight_of(product)
        assert weight is not None
        value = program.weight(str(weight.target)).detach()
        quantizer = next((user for user in weight.users if "quantize" in str(user.target)), None)
        if quantizer is not None:
            others = [program.weight(str(item.target)).detach() for item in quantizer.all_input_nodes[1:]]
            value = quantizer.target(value, *others, **quantizer.kwargs)  # pyright: ignore[reportCallIssue]
        found.append(value)
    return found


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_are_cast_at_compile_time(name: str) -> None:
    program = program_of(name)
    found = captures.optimize(mixture(name), samples(1)[0], passes="cast{dtype=bf16}", checks="structural").program
    products = stacked_products(found)
    assert [nodes.tensor_type(node).dtype for node in products] == [torch.bfloat16, torch.bfloat16]
    for node in products:
        assert {item.target for item in weight_path(node)[:-1]} <= {aten.transpose.int}
        assert str(weight_path(node)[-1].target).endswith("_proj_low")
    assert {weight.dtype for weight in stacks(found).values()} == {torch.bfloat16}
    # The tables of the rotary embedding stay in float32.
    assert 0.5 < found.parameter_bytes / program.parameter_bytes < 0.51
    given = list(samples(1)[0].values())
    # The router's scores are rounded to 8 bits too, so a few tokens reach another expert.
    assert torch.cosine_similarity(*(item.run(given)[0].flatten() for item in (program, found)), 0) > 0.99


@pytest.mark.parametrize("passes", ["smooth-quant", "awq"])
@pytest.mark.parametrize("name", MIXTURES)
def test_channels_that_experts_read_are_scaled(name: str, passes: str) -> None:
    """The router and the experts read the same norm. The checks of the pipeline compare the numbers, as both are exact."""
    data = samples()
    before = program_of(name)
    found = captures.optimize(mixture(name), data[0], passes=passes, data=data)
    up, _ = stacked_products(found.program)
    old, new = weights(before), weights(found.program)
    skipped = found.report.history.steps[-1].skipped
    assert not any("cannot be scaled" in item.reason for item in skipped)
    # The best factors of awq may be ones.
    assert passes == "awq" or not torch.equal(old[0], new[0])
    # Neither activation of a gated feed-forward commutes with a scale, and the halves of the projection are one weight.
    assert torch.equal(old[1], new[1]) and up.name in {item.node for item in skipped}


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_hidden_channels_of_experts_are_pruned(name: str) -> None:
    data = samples()
    found = captures.optimize(mixture(name), data[0], passes="prune-hidden{keep=0.5}", data=data, checks="structural")
    up, down = weights(found.program)
    assert int((up == 0).all(1).all(0).sum()) == int((down == 0).all(2).all(0).sum()) == HIDDEN // 2
    reasons = [item.reason for item in step_of(found.report.history, "prune-hidden").skipped]
    assert any("it is not refitted: its weight is a stack" in reason for reason in reasons)


@pytest.mark.parametrize("passes", ["quantize{scheme=int8-weight}", "quantize{scheme=int4-weight},gptq", "sparsify{keep=0.5}"])
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_changed_experts_are_partitioned(name: str, passes: str) -> None:
    """Each rank has half of the neurons of every expert. The checks of the pipeline compare the numbers of the two ranks."""
    data = samples()
    found = captures.optimize(mixture(name), data[0], passes=f"{passes},shard{{world_size=2}},partition", data=data).program
    shapes = [tuple(weight.shape) for weight in stacks(found.of_rank(1)).values()]
    assert [math.prod(shape) for shape in shapes] == [EXPERTS * HIDDEN * INNER, EXPERTS * HIDDEN * INNER // 2]


def test_a_mixture_is_no_branch_that_layers_lose() -> None:
    single = mixture("deepseek-v3")
    single.config.num_hidden_layers = 2
    model, data = seeded(lambda: type(single)(single.config)), samples()
    with pytest.raises(LissomError, match="it holds a mixture of experts, which has no one branch"):
        captures.optimize(model, data[0], passes="prune-layers{keep=0.5,part=feed-forward}", data=data, checks="structural")
