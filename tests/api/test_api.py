"""Tests of lissom.api: the public face."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.ir.editor import Editor
from lissom.compiler.ir.samples import Sample
from lissom.compiler.pipeline.pass_kinds import Approximation
from lissom.compiler.pipeline.spelling import format_pipeline
from lissom.compiler.verify.divergence import relative_error
from lissom.driver.options import resolve_passes, split_inputs
from lissom.errors import BudgetError, InputError, LissomError, PassError, PipelineTextError, UnsupportedError, VerifyError
from lissom.frontends.capture.device import check_device
from lissom.ops.native import load_kernels
from lissom.passes import RECIPES
from lissom.passes.canonical.remove_no_ops import RemoveNoOps
from tests.support.models import counter, feed_forward, nested, normal, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.support.passes import DoubleGelu, ScaleWeights, StopsHalfway


def refusal(kind: type[LissomError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.fixture(scope="module")
def fast_minilm(minilm):
    return lissom.compile(minilm.model, minilm.example_inputs)


@pytest.fixture(scope="module")
def pairs():
    """Twenty random pairs of batch and length."""
    numbers = random.Random(0)
    return [(numbers.randint(1, 4), numbers.randint(1, 40)) for _ in range(20)]


def test_minilm_equals_the_original_at_every_size(minilm, fast_minilm, pairs):
    worst = 0.0
    for seed, (batch, length) in enumerate(pairs):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, 20000, (batch, length), generator=generator)
        lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        with torch.inference_mode():
            wanted = minilm.model(**inputs)
        found = fast_minilm(**inputs)
        worst = max(worst, relative_error(wanted.last_hidden_state, found.last_hidden_state))
        worst = max(worst, relative_error(wanted.pooler_output, found.pooler_output))
    # Six layers of float32 (unit roundoff 6e-8) that sum 384 and 1536 terms in another order differ by some 1e-6.
    assert worst < 1e-5


def test_minilm_returns_what_the_original_returns(minilm, fast_minilm):
    found = fast_minilm(**minilm.encode(["a sentence"]))
    assert type(found) is type(minilm.model(**minilm.encode(["a sentence"])))


def test_minilm_loses_nodes_and_no_weights(fast_minilm):
    first, *_, last = fast_minilm.report.history.steps
    assert last.size.nodes < first.size.nodes
    assert last.size.flops == first.size.flops


@pytest.mark.parametrize("build", [feed_forward, tiny_bert, tiny_llama, nested])
def test_compiled_model_takes_and_returns_what_original_does(build):
    case = build()
    fast = lissom.compile(case.model, case.inputs)
    with torch.inference_mode():
        wanted = case.model(*case.args, **case.kwargs)
    found = fast(*case.args, **case.kwargs)
    assert type(found) is type(wanted)
    left, left_spec = torch.utils._pytree.tree_flatten(wanted)
    right, right_spec = torch.utils._pytree.tree_flatten(found)
    assert left_spec == right_spec
    # Two layers of float32, unit roundoff 6e-8, with sums of at most 24 terms in another order.
    assert max(map(relative_error, left, right)) < 1e-5


def test_a_tensor_is_the_only_argument():
    fast = lissom.compile(feed_forward().model, normal(2, 5, 8))
    assert fast(normal(3, 4, 8)).shape == (3, 4, 8)


def test_results_need_no_gradients():
    fast = lissom.compile(feed_forward().model, normal(2, 5, 8))
    found = fast(normal(3, 4, 8).requires_grad_())
    assert not found.requires_grad
    assert not found.is_inference()


def test_a_compiled_model_reads_as_its_call():
    fast = lissom.compile(feed_forward().model, normal(2, 5, 8))
    assert repr(fast) == "CompiledModel(FeedForward(x: f32[batch, sequence, 8]), backend='eager')"


def test_a_wrong_call_is_refused():
    fast = lissom.compile(feed_forward().model, normal(2, 5, 8))
    assert refusal(InputError, lambda: fast(normal(2, 5, 9))).startswith("argument 'x' has size 9 in dimension 2; allowed: 8")


def test_call_that_leads_out_of_table_names_table():
    case = tiny_gpt2()
    fast = lissom.compile(case.model, case.inputs)
    positions = case.model.config.n_positions
    ids = tokens(2, positions + 4)
    assert refusal(InputError, lambda: fast(input_ids=ids, attention_mask=torch.ones_like(ids))) == (
        f"the inputs ask for row {positions + 3} of 'wpe.weight', which has rows 0 to {positions - 1}; "
        f"pass token ids inside the vocabulary, and no more tokens than the model has positions"
    )
    ids = torch.full((2, 5), -1)
    assert refusal(InputError, lambda: fast(input_ids=ids, attention_mask=torch.ones_like(ids))).startswith(
        "the inputs ask for row -1 of 'wte.weight', which has rows 0 to "
    )


def test_state_advances_in_the_compiled_model_alone():
    case = counter()
    fast = lissom.compile(case.model, case.inputs)
    first, second = fast(*case.args), fast(*case.args)
    # Adding 3 to values of size 1 rounds to 3e-7.
    torch.testing.assert_close(second - first, torch.full((3, 4), 3.0), rtol=0, atol=1e-6)
    assert case.model.seen.item() == 0.0


def test_first_call_after_compiling_sees_state_of_model():
    case = counter()
    fast = lissom.compile(case.model, case.inputs)
    with torch.no_grad():
        # Four products in another order.
        torch.testing.assert_close(fast(*case.args), case.model(*case.args), rtol=0, atol=1e-6)


def test_model_in_training_mode_is_compiled_for_inference():
    model = feed_forward().model.train()
    fast = lissom.compile(model, normal(2, 5, 8))
    assert all(module.training for module in model.modules())
    assert torch.equal(fast(normal(2, 5, 8)), fast(normal(2, 5, 8)))
    with torch.no_grad():
        wanted = model.eval()(normal(2, 5, 8))
    # Two products of float32 with sums of at most 12 terms, unit roundoff 6e-8.
    torch.testing.assert_close(fast(normal(2, 5, 8)), wanted, rtol=1e-5, atol=1e-6)


def test_the_recipe_exact_is_the_default_and_comes_first():
    model = feed_forward().model
    default = lissom.optimize(model, normal(2, 5, 8))
    explicit = lissom.optimize(model, normal(2, 5, 8), passes="exact")
    spelled = lissom.optimize(model, normal(2, 5, 8), passes=RECIPES["exact"])
    assert default.program.text() == explicit.program.text() == spelled.program.text()
    pipelines = [fast.report.history.pipeline for fast in (default, explicit, spelled)]
    assert pipelines == [RECIPES["exact"]] * 3


def test_passes_follow_the_recipe_exact():
    passes = resolve_passes("remove-no-ops,exact")
    assert format_pipeline(passes) == f"{RECIPES['exact']},remove-no-ops,{RECIPES['exact']}"
    assert format_pipeline(resolve_passes([RemoveNoOps()])) == f"{RECIPES['exact']},remove-no-ops"
    assert format_pipeline(resolve_passes([])) == RECIPES["exact"]
    assert format_pipeline(resolve_passes("exact,remove-no-ops")) == f"{RECIPES['exact']},remove-no-ops"


def test_a_pass_that_is_none_is_refused():
    assert refusal(UnsupportedError, lambda: lissom.compile(feed_forward().model, normal(2, 5, 8), passes=[RemoveNoOps])) == (
        "passes= holds the class RemoveNoOps, which is not a pass; give pass objects, e.g. RemoveNoOps()"
    )


def test_a_mistyped_pass_is_refused():
    found = refusal(PipelineTextError, lambda: resolve_passes("remove-noops"))
    assert "there is no pass 'remove-noops'; did you mean 'remove-no-ops'?" in found


def test_an_unknown_backend_is_refused_before_anything_runs():
    found = refusal(UnsupportedError, lambda: lissom.compile(feed_forward().model, normal(2, 5, 8), backend="egaer"))
    assert found.startswith("there is no backend 'egaer'; did you mean 'eager'?")


def test_unknown_checks_are_refused():
    found = refusal(UnsupportedError, lambda: lissom.compile(feed_forward().model, normal(2, 5, 8), checks="some"))
    assert found == "checks='some' is not known; choose numeric, each, structural, off"


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    found = refusal(UnsupportedError, lambda: lissom.compile(feed_forward().model, normal(2, 5, 8), device=device))
    assert found.startswith(f"device '{device}' is not ")


def test_missing_gpu_is_refused_with_devices_there_are():
    have = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
    assert refusal(UnsupportedError, lambda: check_device("cuda:99")) == (
        f"device 'cuda:99' is not on this machine; it has {have}"
    )


def test_a_device_torch_does_not_know_is_refused():
    assert refusal(UnsupportedError, lambda: check_device("gpu")) == (
        "device 'gpu' is not known to PyTorch; write 'cpu' or 'cuda:0'"
    )


def test_the_cpu_is_always_there():
    assert check_device("cpu") == torch.device("cpu")
    assert check_device(torch.device("cpu")) == torch.device("cpu")
    assert check_device(None) is None


def test_inputs_of_an_unknown_kind_are_refused():
    assert refusal(InputError, lambda: lissom.compile(feed_forward().model, 3)) == (
        "example_inputs is a int; a tuple is positional, a mapping is keywords, a tensor the only argument"
    )


def test_inputs_are_positional_or_keywords():
    x = normal(2, 3)
    assert split_inputs(x) == ((x,), {})
    assert split_inputs((x,)) == ((x,), {})
    assert split_inputs([x]) == ((x,), {})
    assert split_inputs({"x": x}) == ((), {"x": x})


@dataclass(frozen=True)
class KeepsData(Approximation):
    """Remembers the calibration data it was given."""

    seen: ClassVar[list[Sample]] = []

    def run(self, edit: Editor) -> None:
        self.seen[:] = edit.data


def test_data_reaches_the_passes_flat_and_checked():
    case = tiny_bert()
    mask = torch.ones(3, 4, dtype=torch.long)
    data = [{"input_ids": tokens(3, 4), "attention_mask": mask}, (tokens(3, 4, seed=1), mask)]
    lissom.compile(case.model, case.inputs, passes=[KeepsData()], data=data)
    assert [[tensor.shape for tensor in sample] for sample in KeepsData.seen] == [[(3, 4), (3, 4)]] * 2
    assert torch.equal(KeepsData.seen[0][0], tokens(3, 4))


def test_data_that_does_not_fit_is_refused():
    case = tiny_bert()
    found = refusal(InputError, lambda: lissom.compile(case.model, case.inputs, data=[{"input_ids": tokens()}]))
    assert found.startswith("batch 0 of data= does not fit: argument 'attention_mask' is missing; ")


@pytest.mark.parametrize(
    ("wrong", "kind"), [(DoubleGelu(), VerifyError), (StopsHalfway(), PassError)], ids=["wrong numbers", "raises"]
)
def test_a_failing_pass_leaves_the_model_as_it_was(wrong, kind):
    model = feed_forward().model.train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind) as caught:
        lissom.compile(model, normal(2, 5, 8), passes=[wrong])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert caught.value.history.steps[0].notes == ("dynamic: batch (1 or more), sequence (1 or more)",)
    assert format_pipeline([wrong]) in caught.value.history.pipeline.split(",")


def test_a_lossy_pass_leaves_the_model_s_weights_alone():
    model = feed_forward().model
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = lissom.optimize(model, normal(2, 5, 8), passes=[ScaleWeights(factor=0.5)])
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(fast.program.weight("up.weight"), model.up.weight / 2)


def test_weights_no_pass_changed_are_the_model_s_own():
    model = feed_forward().model
    assert lissom.optimize(model, normal(2, 5, 8)).program.weight("up.weight").data_ptr() == model.up.weight.data_ptr()
    fast = lissom.compile(model, normal(2, 5, 8))
    assert fast.program.weight("up.bias").data_ptr() == model.up.bias.data_ptr()


def test_lowered_program_holds_packed_weights_instead_of_plain_ones():
    program = lissom.compile(feed_forward().model, normal(2, 5, 8)).program
    if load_kernels():
        pytest.skip(load_kernels())
    assert set(program.weights()) == {
        "norm.weight", "norm.bias", "up.weight_packed", "up.bias", "down.weight_packed", "down.bias"
    }  # fmt: skip


def test_what_is_optimized_alone_is_what_compile_lowers():
    case = tiny_bert()
    optimized = lissom.optimize(case.model, case.inputs)
    compiled = lissom.compile(case.model, case.inputs)
    step = len(optimized.report.history.steps) - 1
    assert compiled.report.history.texts[step] == optimized.program.text()


def score(call: Callable[..., torch.Tensor]) -> float:
    """Falls with the outputs, through the model's own arguments."""
    return float(call(x=normal(2, 5, 8)).square().mean())


def test_a_metric_calls_the_program_as_the_model():
    fast = lissom.optimize(feed_forward().model, normal(2, 5, 8), passes=[ScaleWeights(factor=0.5)], metric=score)
    steps = fast.report.history.steps
    assert steps[0].metric == steps[-2].metric > steps[-1].metric
    assert "metric" in str(fast.report)


def test_a_budget_is_kept():
    found = refusal(
        BudgetError,
        lambda: lissom.compile(
            feed_forward().model, normal(2, 5, 8), passes=[ScaleWeights(factor=0.1)], metric=score, max_drop=0.001
        ),
    )
    assert found.startswith("scale-weights{factor=0.1} was rolled back: it takes the metric from ")


def test_a_budget_without_a_metric_is_refused():
    found = refusal(UnsupportedError, lambda: lissom.compile(feed_forward().model, normal(2, 5, 8), max_drop=0.1))
    assert found == "max_drop needs a metric to measure the drop of: pass metric="


def test_progress_starts_with_capture_and_counts_to_build():
    told = []
    lissom.compile(feed_forward().model, normal(2, 5, 8), progress=lambda *now: told.append(now))
    count = told[0][2]
    assert told[0] == ("capture", 0, count)
    assert told[-1] == ("build eager", count - 1, count)
    assert [now[1] for now in told] == list(range(count))
    assert count >= RECIPES["exact"].count(",") + 3


def test_progress_counts_the_lowering_and_the_build():
    told = []
    lissom.compile(feed_forward().model, normal(2, 5, 8), progress=lambda *now: told.append(now))
    assert told[-1][0] == "build eager"
    assert [now[1] for now in told] == list(range(told[0][2]))


def test_sizes_may_be_named_or_fixed():
    model = feed_forward().model
    named = lissom.compile(model, normal(2, 5, 8), dynamic={"x": {1: "length"}})
    fixed = lissom.compile(model, normal(2, 5, 8), dynamic=False)
    assert repr(named).startswith("CompiledModel(FeedForward(x: f32[2, length, 8])")
    assert repr(fixed).startswith("CompiledModel(FeedForward(x: f32[2, 5, 8])")


def test_compiled_model_does_not_follow_later_changes_of_structure():
    model = feed_forward().model
    fast = lissom.compile(model, normal(2, 5, 8))
    before = fast(normal(2, 5, 8)).clone()
    model.up = nn.Linear(8, 12)
    assert torch.equal(fast(normal(2, 5, 8)), before)


def test_the_package_offers_compile_and_its_result():
    assert lissom.compile is lissom.api.compile
    assert lissom.__version__.count(".") == 2


@pytest.mark.gpu
def test_a_model_is_compiled_for_a_gpu():
    case = tiny_llama()
    fast = lissom.compile(case.model, case.inputs, device="cuda")
    found = fast(**{name: tensor.cuda() for name, tensor in case.kwargs.items()}).logits
    assert found.is_cuda
    assert not next(case.model.parameters()).is_cuda
    with torch.no_grad():
        wanted = case.model(**case.kwargs).logits
    # Other kernels sum in another order: float32, unit roundoff 6e-8, sums of at most 24 terms.
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-5)


def test_a_program_is_compiled_like_its_model():
    case = tiny_bert()
    program = lissom.optimize(case.model, case.inputs, passes="prune-neurons{keep=0.5}").program
    module = program.trainable()
    with torch.no_grad():
        module.get_parameter("encoder.layer.0.output.dense.weight").mul_(1.1)
    compiled = lissom.compile(program.with_weights(module), case.inputs)
    assert type(compiled.config) is type(case.model.config)
    assert compiled.program.name == "BertModel"
    wanted, found = module(**case.inputs), compiled(**case.inputs)
    assert torch.allclose(wanted.last_hidden_state, found.last_hidden_state, atol=1e-5)
    assert type(found).__name__ == type(case.model(**case.inputs)).__name__
    with pytest.raises(lissom.LissomError, match="argument 'attention_mask' is missing"):
        lissom.compile(program, {"input_ids": case.inputs["input_ids"]})
