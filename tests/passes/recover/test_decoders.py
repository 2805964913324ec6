"""Tests of training programs with a KV cache, as `compile_generation` makes them."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import Step
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.training.losses import outputs_of
from lissom.compiler.training.teacher import Teacher
from lissom.driver.options import resolve_passes
from lissom.errors import InputError, RequirementError
from lissom.frontends.generation.decoder import capture_decoder
from lissom.generation.decoder import labelled_prompts, prompts
from lissom.passes.recover.finetune import Finetune
from tests.support.decoders import DECODERS, RECURRENT, VOCABULARY
from tests.support.models import seeded
from tests.support.neighbours import all_but_slow

QUANTIZED = "quantize{scheme=int4-weight,group=8}"


def lively(name: str) -> nn.Module:
    """A decoder with weights large enough that quantization changes its logits."""
    model = seeded((DECODERS | RECURRENT)[name])
    with torch.no_grad():
        for item in model.parameters():
            if item.dim() > 1:
                item.mul_(4.0)
    return model


def texts(count: int = 8, rows: int = 2, length: int = 12, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (rows, length), generator=generator) for _ in range(count)]


@cache
def captured(name: str, batch: int) -> Program:
    return capture_decoder(lively(name), max_length=32, batch=batch).program


def trained(name: str, passes: str, data: list | None = None, batch: int = 1) -> tuple[Program, Step]:
    """A decoder's program after the passes, and the record of the last that trained."""
    given = labelled_prompts(texts() if data is None else data, batch, 32)
    samples, labels = [sample for sample, _ in given], [item for _, item in given]
    pipeline = Pipeline(resolve_passes(passes), checks="structural", data=samples, labels=labels)
    program, history = pipeline.run(captured(name, batch))
    return program, next((step for step in reversed(history.steps) if step.curve), history.steps[-1])


def best(step: Step) -> float:
    return min(point.held_out for point in step.curve)


@pytest.mark.parametrize("name", all_but_slow(["llama", "gemma2", "gpt2"], "llama"))
def test_distills_a_program_with_a_cache(name) -> None:
    """The prefill is trained on all tokens, and the state stays empty and without gradients."""
    passes = f"{QUANTIZED},distill{{steps=80,learning_rate=3e-4,precision=fp32}}"
    program, step = trained(name, passes, texts(20))
    assert step.rewritten and best(step) < 0.9 * step.curve[0].held_out
    assert program.state
    for tensor in program.state_tensors():
        assert not tensor.any() and not tensor.requires_grad and tensor.grad_fn is None


@pytest.mark.slow
def test_decodes_with_the_trained_weights() -> None:
    """From end to end: nearer to the model than before, decoding token by token gives the logits of the whole prefill, and the
    part of the recipe that drops tokens comes after the last pass that trains.
    """
    model, found = lively("llama"), []
    for passes in (QUANTIZED, f"{QUANTIZED},distill{{steps=80,learning_rate=3e-4}}"):
        decoder = lissom.compile_generation(model, max_length=32, passes=passes, data=texts(20), goal=None)
        total = 0.0
        for ids in itertools.chain.from_iterable(item.split(1) for item in texts(8, seed=7)):
            decoder.reset()
            with torch.no_grad():
                wanted, logits = model(ids).logits[:, -1].log_softmax(-1), decoder.step(ids).log_softmax(-1)
            total += float(nn.functional.kl_div(logits, wanted, reduction="batchmean", log_target=True))
        found.append(total)
    assert found[1] < found[0]
    (ids,) = texts(1, 1, seed=9)
    decoder.reset()
    whole = decoder.step(ids)
    decoder.reset()
    parts = [decoder.step(ids[:, at : at + 1]) for at in range(ids.shape[1])]
    assert torch.allclose(parts[-1], whole, atol=1e-4)
    steps = {item.spelling.partition("{")[0]: item for item in decoder.report.history.steps}
    assert steps["distill"].index < steps["eliminate-dead-tokens"].index and steps["eliminate-dead-tokens"].rewritten


def test_padding_of_shorter_rows_does_not_count() -> None:
    """Of a batch of rows of other lengths, the divergence is the mean over all tokens that are no padding."""
    model = lively("llama")
    program = Pipeline(resolve_passes(QUANTIZED), checks="off").run(captured("llama", 2))[0]
    ids, mask = texts(1)[0], torch.ones(2, 12, dtype=torch.int64)
    mask[0, 8:] = 0
    (sample,) = prompts([{"input_ids": ids, "attention_mask": mask}], 2, 32)
    exact = Pipeline(resolve_passes("exact"), checks="off").run(captured("llama", 2))[0]
    (output,), _ = outputs_of(program)
    teacher = Teacher.of(exact, [output], program, "distill")
    with torch.no_grad():
        found = teacher.end_to_end(sample, teacher.targets(sample), temperature=1.0, hidden=0.0)
    alone = Pipeline(resolve_passes(QUANTIZED), checks="off").run(captured("llama", 1))[0]
    (output,), _ = outputs_of(alone)
    single = Teacher.of(
        Pipeline(resolve_passes("exact"), checks="off").run(captured("llama", 1))[0], [output], alone, "distill"
    )
    total = 0.0
    with torch.no_grad():
        for row, length in ((0, 8), (1, 12)):
            (sample,) = prompts([ids[row : row + 1, :length]], 1, 32)
            total += length * float(single.end_to_end(sample, single.targets(sample), temperature=1.0, hidden=0.0))
        logits = model(ids[1:]).logits
    assert float(found) == pytest.approx(total / 20, rel=1e-4)
    (hidden,) = single.runs.run(prompts([ids[1:]], 1, 32)[0])
    assert torch.allclose(single.heads[0].finish(hidden @ single.heads[0].weights()[0].T), logits, atol=1e-4)


def test_finetunes_on_labels() -> None:
    model, (ids,) = lively("llama"), texts(1)
    data = [{"input_ids": ids, "labels": ids}] * 6
    _, step = trained("llama", "finetune{steps=30,learning_rate=0.003}", data, batch=2)
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert step.curve[0].held_out == pytest.approx(float(wanted), rel=1e-4)
    assert step.curve[-1].held_out < 0.7 * step.curve[0].held_out
    with pytest.raises(RequirementError, match="finetune needs labels"):
        trained("llama", "finetune{steps=1}")
    with pytest.raises(InputError, match=r"labels of \[2, 3\] for input_ids of \[2, 12\]; give both alike"):
        labelled_prompts([{"input_ids": ids, "labels": ids[:, :3]}], 1, 32)


def test_loss_of_ones_own_gets_output_of_call() -> None:
    """Without all_logits that is the last token's; state is not written."""
    seen = []

    def loss(output: object, labels: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(output, torch.Tensor) and labels is None
        seen.append(output.shape)
        return output.square().mean()

    program, _ = Pipeline(
        [*resolve_passes("exact"), Finetune(steps=3, loss=loss)], checks="structural", data=prompts(texts(), 1, 32)
    ).run(captured("llama", 1))
    assert set(seen) == {torch.Size([1, 1, VOCABULARY])} and not any(map(torch.Tensor.any, program.state_tensors()))


@pytest.mark.parametrize("name", all_but_slow(["mamba2", "olmo_hybrid"], "mamba2"))
def test_recurrent_decoders(name) -> None:
    _, step = trained(name, f"{QUANTIZED},distill{{steps=80,learning_rate=1e-3}}", texts(20))
    assert best(step) < step.curve[0].held_out


def test_a_quantized_cache_is_refused() -> None:
    with pytest.raises(RequirementError, match="no gradients through a quantized KV cache; put it before quantize-cache"):
        trained("llama", "quantize-cache,distill{steps=1}")
    _, step = trained("llama", f"{QUANTIZED},distill{{steps=2}},quantize-cache")
    assert step.curve


def test_state_written_in_place_is_refused() -> None:
    with pytest.raises(RequirementError, match="writes state in place; put it before write-state-in-place"):
        trained("llama", f"{QUANTIZED},write-state-in-place,distill{{steps=1}}")


def test_weights_of_trained_program_go_back_into_model() -> None:
    """A program without a cache is refused with what to do, and that works."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, use_cache=False
    )
    model = seeded(lambda: transformers.LlamaForCausalLM(config))
    data = [{"input_ids": ids, "labels": ids} for ids in texts()]
    trained = lissom.optimize(
        model, {"input_ids": texts(1)[0]}, passes="finetune{steps=5,learning_rate=0.003}", data=data
    ).program
    with pytest.raises(InputError, match=r"model\.load_state_dict\(program\.weights\(\), strict=False\)"):
        lissom.compile_generation(trained, max_length=32)
    model.load_state_dict(trained.weights(), strict=False)
    decoder = lissom.compile_generation(model, max_length=32)
    (ids,) = texts(1, 1)
    with torch.no_grad():
        wanted = trained(input_ids=ids)["logits"][:, -1]
    assert torch.allclose(decoder.step(ids), wanted, atol=1e-4)
