"""Tests of distill: what it recovers, what it keeps, and what it refuses."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lissom
from lissom.compiler.pipeline.pass_kinds import Training
from lissom.compiler.pipeline.spelling import format_pass
from lissom.compiler.training import loop
from lissom.compiler.verify.divergence import compare
from lissom.errors import PassError, PipelineTextError, RequirementError, VerifyError
from lissom.ops.native import load_kernels
from lissom.passes.prune.sparsify import Sparsify
from lissom.passes.recover.distill import Distill
from tests.support import captures
from tests.support.calibrated import batches
from tests.support.harness import check_golden
from tests.support.models import FeedForward, normal, seeded, tied, tiny_bert, tiny_gpt2, tiny_llama, tokens

DATA = [normal(8, 5, 8, seed=seed) for seed in range(12)]


def recovered(passes: str, **options):
    """A feed-forward after the passes, and its history."""
    found = captures.optimize(seeded(FeedForward), normal(2, 5, 8), passes=passes, **({"data": DATA} | options))
    return found.program, found.report.history


def error(program) -> float:
    """The mean squared error of a feed-forward's outputs on fresh data."""
    model, fresh = seeded(FeedForward), normal(50, 5, 8, seed=99)
    with torch.no_grad():
        return float((model(fresh) - program(fresh)).square().mean())


def step(history, name="distill"):
    return next(item for item in history.steps if item.spelling.startswith(name))


def test_rewrites() -> None:
    """Weights change, and nothing else."""
    program, history = recovered("prune-neurons{keep=0.5},distill{steps=20,learning_rate=0.01}")
    check_golden("distill", f"{program.text()}\n{step(history).summary}\n")


def test_leaves_other_graphs_alone() -> None:
    before, _ = recovered("prune-neurons{keep=0.5}")
    after, _ = recovered("prune-neurons{keep=0.5},distill{steps=2}")
    assert after.text() == before.text()


def test_recovers_what_pruning_lost() -> None:
    before, _ = recovered("prune-neurons{keep=0.5}")
    program, history = recovered("prune-neurons{keep=0.5},distill{steps=400,learning_rate=0.01}")
    found = step(history)
    assert error(program) < 0.7 * error(before)
    assert found.curve[-1].held_out < 0.8 * found.curve[0].held_out
    assert found.curve[0].loss is None and found.curve[-1].step == 400
    assert program.weight("up.weight").shape == (6, 8)
    assert found.notes[-1].startswith("400 steps in ")


def test_the_model_is_left_alone() -> None:
    model = seeded(FeedForward)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lissom.optimize(model, normal(2, 5, 8), passes="prune-neurons{keep=0.5},distill{steps=5}", data=DATA)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert all(item.requires_grad and item.grad is None for item in model.parameters())


def test_the_same_seed_gives_the_same_weights() -> None:
    text = "prune-neurons{keep=0.5},distill{steps=20,seed=3,precision=fp32}"
    first, second = (recovered(text)[0] for _ in range(2))
    assert all(torch.equal(weight, second.weight(name)) for name, weight in first.weights().items())


def test_never_worse_and_says_so() -> None:
    """Far too high a learning rate: the weights from before stay, bit by bit."""
    before, _ = recovered("prune-neurons{keep=0.5}")
    after, history = recovered("prune-neurons{keep=0.5},distill{steps=1,learning_rate=5000.0}")
    assert all(torch.equal(weight, after.weight(name)) for name, weight in before.weights().items())
    assert "gained nothing" in step(history).notes[-1]
    assert step(history).rewritten == 0


def test_zeros_stay_zeros() -> None:
    before, _ = recovered("sparsify{keep=0.5}")
    program, history = recovered("sparsify{keep=0.5},distill{steps=50,learning_rate=0.01}")
    for name in ("up.weight", "down.weight"):
        assert torch.equal(program.weight(name) == 0, before.weight(name) == 0)
        assert not torch.equal(program.weight(name), before.weight(name))
    assert step(history).rewritten


def test_a_pass_that_fills_zeros_is_refused() -> None:
    """The pipeline checks every training pass, so the loop cannot forget."""

    @dataclass(frozen=True)
    class Fills(Training):
        def run(self, edit) -> None:
            weight = edit.program.weight("up.weight")
            with torch.no_grad():
                weight.add_(1.0)

    with pytest.raises(VerifyError, match=r"must keep the zeros of pruned matrices, and 'up\.weight' has other values"):
        recovered([Sparsify(keep=0.5), Fills()])


def test_training_goes_through_the_rounding() -> None:
    """Quantization-aware: the weights in the graph stay float, and the rounded program comes nearer to the teacher."""
    passes = "prune-neurons{keep=0.5},quantize{scheme=int4-weight,group=4}"
    before, _ = recovered(passes)
    program, _ = recovered(f"{passes},distill{{steps=400,learning_rate=0.01}}")
    assert error(program) < 0.8 * error(before)
    assert "fake_quantize" in program.text()


@pytest.mark.multiprocess
def test_a_step_without_kernels_is_noted() -> None:
    """In a process of its own, where the kernels are switched off: it trains by PyTorch's operators, and says so."""
    script = (
        "import torch, lissom\n"
        "from tests.support.models import FeedForward, normal, seeded\n"
        "passes = 'quantize{scheme=int8-dynamic},distill{steps=3}'\n"
        "data = [normal(8, 5, 8, seed=seed) for seed in range(3)]\n"
        "found = lissom.optimize(seeded(FeedForward), data[0], passes=passes, data=data)\n"
        "print(found.report.history.steps[-1].notes)\n"
    )
    options = {"capture_output": True, "text": True, "check": True}
    for switch, said in (("0", True), ("1", bool(load_kernels()))):
        run = subprocess.run([sys.executable, "-c", script], env={**os.environ, "LISSOM_NATIVE": switch}, **options)
        assert ("the quantizers in the graph run without Lissom's kernels" in run.stdout) == said


def test_scales_learn_unless_told_otherwise() -> None:
    passes = "prune-neurons{keep=0.5},quantize{scheme=int4-weight,group=4}"
    before, _ = recovered(passes)
    names = [name for name in before.weights() if name.endswith("_scale")]
    assert names
    for option, changes in (("", True), (",scales=false", False)):
        program, _ = recovered(f"{passes},distill{{steps=200,learning_rate=0.01{option}}}")
        assert any(not torch.equal(program.weight(name), before.weight(name)) for name in names) == changes
        assert all(program.weight(name).dtype == before.weight(name).dtype for name in names)
        assert all(torch.equal(program.weight(name).sign(), before.weight(name).sign()) for name in names)


def test_small_scales_beside_large_ones_stay_above_zero() -> None:
    """Each learns by its own size. At one rate for all, these went to 4e-6; float16 makes smaller ones 0, and outputs NaN."""
    model = seeded(FeedForward)
    with torch.no_grad():
        model.up.weight[::2] *= 0.01
    data = [normal(8, 5, 8, seed=seed) for seed in range(3)]
    passes = "quantize{scheme=int4-weight,group=4},distill{steps=200,learning_rate=0.01}"
    program = captures.optimize(model, data[0], passes=passes, data=data).program
    scale = program.weight("up.weight_scale")
    assert scale.dtype == torch.float16
    assert float(scale.abs().min()) >= torch.finfo(torch.float16).tiny
    assert all(bool(item.isfinite().all()) for item in program.run([data[1]]))


def test_tied_weights_stay_one() -> None:
    case = tied()
    data = [(tokens(seed=seed),) for seed in range(6)]
    text = "quantize{scheme=int4-weight,embeddings=true,lm_head=true,group=4}"
    text += ",distill{steps=30,embeddings=true,scales=false,learning_rate=0.001}"
    found = captures.optimize(case.model, case.inputs, passes=text, data=data)
    assert [name for name, item in found.program.weights().items() if isinstance(item, nn.Parameter)] == ["head.weight"]
    assert not torch.equal(found.program.weight("head.weight"), case.model.head.weight)


def test_embeddings_stay_unless_asked() -> None:
    case = tiny_bert()
    with torch.no_grad():
        for item in case.model.parameters():
            item.mul_(5.0)
    for option, changes in (("", False), (",embeddings=true", True)):
        text = f"prune-layers{{keep=0.5}},distill{{steps=40,blockwise=0,learning_rate=0.0005{option}}}"
        found = captures.optimize(case.model, case.inputs, passes=text, data=batches())
        names = [name for name in found.program.weights() if "embeddings.word" in name]
        same = torch.equal(found.program.weight(names[0]), dict(case.model.named_parameters())[names[0]])
        assert same != changes, step(found.report.history).notes


def test_a_quantized_table_and_the_scales_of_others_stay() -> None:
    case, passes = tiny_bert(), "quantize{scheme=int4-weight,embeddings=true,group=4}"
    with torch.no_grad():
        for item in case.model.parameters():
            item.mul_(5.0)
    before = captures.optimize(case.model, case.inputs, passes=passes, data=batches()).program
    for option in ("", ",embeddings=true", ',only="encoder.layer.1.*"'):
        text = f"{passes},distill{{steps=40,blockwise=0,learning_rate=0.0005{option}}}"
        after = captures.optimize(case.model, case.inputs, passes=text, data=batches()).program
        changed = {name for name, weight in before.weights().items() if not torch.equal(weight, after.weight(name))}
        assert any(name.startswith("encoder.layer.1.") for name in changed), option
        assert any("word_embeddings" in name for name in changed) == ("embeddings" in option), changed
        assert all(name.startswith("encoder.layer.1.") for name in changed) == ("only" in option), changed


def test_only_the_named_modules_learn() -> None:
    case = tiny_bert()
    text = "prune-layers{keep=0.5}"
    before = captures.optimize(case.model, case.inputs, passes=text, data=batches()).program
    text += ',distill{steps=40,blockwise=0,learning_rate=0.0005,only="encoder.layer.0.output,encoder.layer.1.output"}'
    after = captures.optimize(case.model, case.inputs, passes=text, data=batches()).program
    changed = {name for name, weight in before.weights().items() if not torch.equal(weight, after.weight(name))}
    assert changed and all(".output." in name and ".attention." not in name for name in changed)


@pytest.mark.parametrize("case", [tiny_bert, tiny_gpt2, tiny_llama], ids=["bert", "gpt2", "llama"])
@pytest.mark.parametrize("passes", ["prune-layers{keep=0.5}", "prune-heads{keep=0.5}", "low-rank{keep=0.5}", "quantize"])
def test_models(case, passes) -> None:
    """Every combination trains and verifies, with hidden states at the residual adds that are left."""
    found = case()
    data = batches() if "attention_mask" in found.inputs else [{"input_ids": tokens(seed=seed)} for seed in range(4)]
    after = captures.optimize(found.model, found.inputs, passes=f"{passes},distill{{steps=12,learning_rate=0.001}}", data=data)
    curve = step(after.report.history).curve
    assert min(point.held_out for point in curve) <= curve[0].held_out


def test_an_interrupt_keeps_the_best(monkeypatch) -> None:
    real, calls = loop.Run._take_step, itertools.count()

    def stop(self, batch, done):
        if next(calls) == 100:
            raise KeyboardInterrupt
        return real(self, batch, done)

    monkeypatch.setattr(loop.Run, "_take_step", stop)
    program, history = recovered("prune-neurons{keep=0.5},distill{steps=200,learning_rate=0.01}")
    found = step(history)
    assert "stopped early: it was interrupted; the best weights so far are kept" in found.notes
    assert error(program) < 0.8 * error(recovered("prune-neurons{keep=0.5}")[0])


def test_a_loss_that_is_not_finite_names_the_layer() -> None:
    class Diverges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            up = self.up(x)
            return self.down(torch.where(up > 0, up.sqrt(), torch.zeros_like(up)))

    data = [normal(4, 3, 8, seed=seed) for seed in range(4)]
    # The gradient of the root below zero is NaN, although its value is not used.
    found = lissom.optimize(seeded(Diverges), normal(2, 3, 8), passes="quantize,distill{steps=5}", data=data)
    notes = step(found.report.history).notes
    assert any("stopped early: the loss or its gradient was not finite after 0 steps" in note for note in notes)


@pytest.mark.parametrize(
    ("passes", "data", "message"),
    [
        ("prune-neurons{keep=0.5},distill{steps=1}", (), "distill needs data to train on: pass data="),
        ("distill{steps=1}", DATA, "distill has no teacher: no lossy pass came before it"),
        ("prune-neurons{keep=0.5},distill{steps=1}", [normal(1, 5, 8)], "distill has one row of data, and needs at least two"),
        ('prune-neurons{keep=0.5},distill{steps=1,only="nowhere"}', DATA, "distill has no weights to train: stored integers"),
    ],
)
def test_requirements(passes, data, message) -> None:
    with pytest.raises(RequirementError, match=message):
        recovered(passes, data=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("steps=0", "steps is 0; give 1 or more"),
        ("steps=1,minutes=1", "minutes and steps are both given; give one of them"),
        ("minutes=0", "minutes is 0.0; give a number above 0"),
        ("alpha=2", "alpha is 2.0; give a fraction from 0 to 1"),
        ("temperature=0", "temperature is 0.0; give a number above 0"),
        ("held_out=1", "held_out is 1.0; give a fraction between 0 and 1"),
        ("precision=fp8", "option 'precision' of distill takes one of auto, fp32, bf16, fp16"),
    ],
)
def test_options(options, message) -> None:
    with pytest.raises(PipelineTextError, match=message):
        recovered(f"prune-neurons{{keep=0.5}},distill{{{options}}}")


def test_minutes_end_the_run() -> None:
    _, history = recovered("prune-neurons{keep=0.5},distill{minutes=0.02}")
    assert 1.0 <= step(history).curve[-1].seconds < 20


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_float32_weights(precision) -> None:
    program, history = recovered(f"prune-neurons{{keep=0.5}},distill{{steps=100,learning_rate=0.01,precision={precision}}}")
    assert f"in {precision}" in step(history).notes[-1]
    assert {weight.dtype for weight in program.weights().values()} == {torch.float32}
    assert step(history).curve[-1].held_out < step(history).curve[0].held_out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_a_program_in_bfloat16_learns_block_by_block(precision) -> None:
    """A norm reads the teacher's value, which is in float32, in the place of one in bfloat16."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    data = [normal(4, 5, 16, seed=seed) for seed in range(4)]
    passes = f"cast{{dtype=bf16}},distill{{steps=2,blockwise=1,precision={precision}}}"
    found = captures.optimize(model, data[0], passes=passes, data=data)
    assert found.report.history.steps[-1].curve[-1].step == 2


@pytest.mark.parametrize(("dtype", "name", "precision"), [("fp16", "float16", "bf16"), ("bf16", "bfloat16", "fp16")])
def test_program_in_half_precision_is_not_trained_in_other(dtype, name, precision) -> None:
    for allowed in ("auto", dtype):
        _, history = recovered(f"cast{{dtype={dtype}}},distill{{steps=2,precision={allowed}}}")
        assert step(history).curve[-1].step == 2
    message = f"precision={precision} does not go with a program in {name}; cast after it, or leave precision= out"
    with pytest.raises(RequirementError, match=message):
        recovered(f"cast{{dtype={dtype}}},distill{{steps=2,precision={precision}}}")


def test_rate_that_makes_student_worse_falls_after_quarter() -> None:
    _, history = recovered("prune-neurons{keep=0.5},distill{steps=60,learning_rate=0.3}")
    first, *points = step(history).curve
    assert all(point.held_out > first.held_out for point in points if point.step <= 15)
    assert points[-1].held_out < first.held_out
    assert step(history).notes[-2] == (
        "the first 15 steps made it worse, so it went back to the start and on with a thirtieth of the learning rate; "
        "learning_rate=0.01 takes all the time for it"
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_in_four_bits_learn_in_half_precision(precision) -> None:
    """Their scales are in float16, in which nothing is computed."""
    passes = "prune-neurons{keep=0.5},quantize{scheme=int4-weight,group=4}"
    program, history = recovered(f"{passes},distill{{steps=40,precision={precision}}}")
    assert f"in {precision}" in step(history).notes[-1]
    assert any(weight.dtype == torch.float16 for weight in program.weights().values())


def test_the_curve_is_saved_and_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    found = captures.optimize(
        seeded(FeedForward), normal(2, 5, 8), passes="prune-neurons{keep=0.5},distill{steps=20}", data=DATA
    )
    history = found.report.history
    again = type(history).from_json(history.to_json(), history.texts)
    assert step(again).curve == step(history).curve
    found.report.plot("training", tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text(encoding="utf-8").count("<svg") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["curve.svg"]
    with pytest.raises(lissom.LissomError, match=r"'curve\.txt' ends in no format of a picture"):
        found.report.plot("training", tmp_path / "curve.txt")
    plain = captures.optimize(seeded(FeedForward), normal(2, 5, 8))
    with pytest.raises(lissom.LissomError, match="no training pass ran"):
        plain.report.plot("training", tmp_path / "curve.svg")


def test_backends_run_what_was_trained() -> None:
    case = tiny_bert()
    for backend in ("eager", "onnxruntime"):
        passes = "prune-heads{keep=0.5},distill{steps=4}"
        found = captures.compile(case.model, case.inputs, passes=passes, data=batches(), backend=backend)
        wanted = found.program.run(found.program.signature.flatten((), case.inputs))
        divergence = compare([wanted], [list(found(**case.inputs).values())])
        assert divergence.relative_error < 1e-4


def test_text() -> None:
    assert format_pass(Distill(steps=3, alpha=0.25)) == "distill{steps=3,alpha=0.25}"


def test_weights_that_do_not_learn_are_not_copied() -> None:
    """An embedding table may be most of a model; it stays the model's own."""
    case = tiny_bert()
    passes = "prune-layers{keep=0.5},distill{steps=2,blockwise=0}"
    found = captures.optimize(case.model, case.inputs, passes=passes, data=batches()).program
    table, other = "embeddings.word_embeddings.weight", "encoder.layer.0.output.dense.weight"
    own = dict(case.model.named_parameters())
    assert found.weight(table).data_ptr() == own[table].data_ptr()
    assert found.weight(other).data_ptr() != own[other].data_ptr()


def test_pass_that_writes_weights_it_calls_fixed_is_refused() -> None:
    @dataclass(frozen=True)
    class Careless(Training):
        def fixed(self, program) -> list[str]:
            return ["up.weight"]

        def run(self, edit) -> None:
            with torch.no_grad():
                edit.program.weight("up.weight").mul_(1.5)

    with pytest.raises(PassError, match=r"careless wrote to the weight 'up\.weight' in place"):
        recovered([Sparsify(keep=0.5), Careless()])
