"""Tests of the losses of large vocabularies: values and gradients equal those of the whole logits, in less memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from lissom.compiler.ir.program import Program
from lissom.compiler.training.lm_head import LmHead, Trunk, lm_head_of
from lissom.compiler.training.losses import IGNORED, Output, cross_entropy, distance, divergence, next_labels
from lissom.compiler.training.vocabulary import supervision, vocabulary_loss
from tests.support import captures
from tests.support.models import normal, seeded

WORDS, WIDTH = 97, 16
FORMS = {"float": "exact", "int4": "quantize{scheme=int4-weight,group=8,lm_head=true}"}
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "use_cache": False,
}  # fmt: skip


def llama() -> torch.nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def gemma() -> torch.nn.Module:
    """A soft cap of the logits, low enough to bend them, and a head tied to the embedding table."""
    config = transformers.Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5)
    return transformers.Gemma2ForCausalLM(config)


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=WIDTH, n_layer=1, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def phi() -> torch.nn.Module:
    """An LM head with a bias."""
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**SIZES))
    with torch.no_grad():
        model.lm_head.bias.normal_()
    return model


def granite() -> torch.nn.Module:
    """Logits divided by a number."""
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=3.0))


def ids(rows: int = 3, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def program_of(model: torch.nn.Module, passes: str = "exact") -> tuple[Program, LmHead]:
    """A program with weights that learn, and its LM head."""
    found = captures.optimize(model, {"input_ids": ids()}, passes=passes).program.own_copy()
    head = lm_head_of(found, found.output.args[0][0])
    assert head is not None and head.vocabulary == WORDS
    for name, item in found.weights().items():
        if name.endswith("_scale") and item.dim():  # of a quantizer, and not Gemma's number for all embeddings
            found.set_weight(name, torch.nn.Parameter(item.float()))
    return found, head


def gradients(program: Program, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    learned = {name: item for name, item in program.weights().items() if item.requires_grad}
    found = torch.autograd.grad(loss, list(learned.values()), allow_unused=True)
    return {name: item for name, item in zip(learned, found, strict=True) if item is not None}


class Largest(TorchDispatchMode):
    """Keeps the most elements of a tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for item in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return found


@pytest.mark.parametrize(
    ("form", "case"),
    [
        pytest.param(form, case, marks=() if case is llama or (form, case) == ("int4", gemma) else pytest.mark.slow)
        for form in FORMS
        for case in (llama, gemma, gpt2, phi, granite)
    ],
)
def test_equals_the_whole_logits(form, case) -> None:
    """Both losses with padding and unlabelled tokens, from a teacher of its own head, in parts of two rows."""
    student, head = program_of(seeded(case), FORMS[form])
    torch.manual_seed(1)
    teacher, other = program_of(case().eval())
    part, wanted_part = Trunk.of(student, {0: head}, "test"), Trunk.of(teacher, {0: other}, "test")
    real, labels = torch.ones(3, 7, dtype=torch.bool), ids(seed=1)
    real[0, 4:] = False
    labels[0, 4:] = IGNORED
    output = Output(0, head.linear, "logits", shifted=True)
    with torch.no_grad():
        (wanted,), (kept,) = teacher.run([ids()]), wanted_part.run([ids()])
    (logits,), (hidden,) = student.run([ids()]), part.run([ids()])
    whole = 0.25 * distance("logits", logits, wanted, real, 2.0) + 0.75 * cross_entropy(output, logits, labels)
    learned = supervision(
        hidden, (other, kept), real=real, temperature=2.0, share=0.25, labels=next_labels(output, labels), alpha=0.75
    )
    loss = vocabulary_loss(head, hidden, learned, elements=2 * WORDS)
    # Sums over some hundred float32 numbers in another order.
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    right, found = gradients(student, whole), gradients(student, loss)
    assert right.keys() == found.keys() and any("head" in name or "wte" in name for name in right)
    for name, gradient in right.items():
        assert (gradient - found[name]).abs().max() <= 2e-5 * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("elements", [WORDS, 5 * WORDS, 1 << 20])
def test_the_size_of_parts_does_not_matter(elements) -> None:
    student, head = program_of(seeded(phi))
    (hidden,) = Trunk.of(student, {0: head}, "test").run([ids()])
    wanted = vocabulary_loss(head, hidden, supervision(hidden, labels=ids(seed=1)))
    found = vocabulary_loss(head, hidden, supervision(hidden, labels=ids(seed=1)), elements=elements)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_a_student_of_another_width() -> None:
    """The hidden width is pruned; each program has a head of its own."""
    model = seeded(llama)
    teacher, other = program_of(model)
    data = [{"input_ids": ids(seed=seed)} for seed in range(2)]
    pruned = captures.optimize(model, {"input_ids": ids()}, passes="prune-hidden{keep=0.5}", data=data).program
    head = lm_head_of(pruned, pruned.output.args[0][0])
    assert head is not None
    (hidden,), (kept,) = Trunk.of(pruned, {0: head}, "test").run([ids()]), Trunk.of(teacher, {0: other}, "test").run([ids()])
    assert hidden.shape[-1] < kept.shape[-1] == WIDTH
    # In float32 the sum of a divergence of 2e-4 cancels to 1e-3 of it.
    logits = [program.run([ids()])[0].double().flatten(0, 1) for program in (pruned, teacher)]
    wanted = divergence(*logits, temperature=2.0)
    found = vocabulary_loss(head, hidden, supervision(hidden, (other, kept.detach()), temperature=2.0))
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_products_are_in_the_dtype_of_autocast() -> None:
    student, head = program_of(seeded(llama))
    part, labels = Trunk.of(student, {0: head}, "test"), ids(seed=1)
    output = Output(0, head.linear, "logits")
    found: list[dict[str, torch.Tensor]] = []
    for whole in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            (value,) = (student if whole else part).run([ids()])
            loss = (
                cross_entropy(output, value, labels)
                if whole
                else vocabulary_loss(head, value, supervision(value, labels=labels))
            )
        found.append(gradients(student, loss))
    for name, gradient in found[0].items():
        assert found[1][name].dtype == torch.float32
        # Some roundings to 8 bits each.
        assert (gradient - found[1][name]).norm() <= 2e-2 * gradient.norm(), name


def test_gradients_do_not_underflow_in_float16() -> None:
    """With labels that weigh 1e-6, the gradient by a logit is at most 5e-8, and float16 has no number but zero below 6e-8."""
    student, head = program_of(seeded(llama))
    part, labels, scale = Trunk.of(student, {0: head}, "test"), ids(seed=1), 2.0**30
    wanted = gradients(student, scale * 1e-6 * cross_entropy(Output(0, head.linear, "logits"), student.run([ids()])[0], labels))
    with torch.autocast("cpu", torch.float16):
        (value,) = part.run([ids()])
        loss = vocabulary_loss(head, value, supervision(value, labels=labels, alpha=1e-6))
    found = gradients(student, scale * loss)
    for name, gradient in wanted.items():
        # Some roundings to 11 bits each.
        assert (gradient - found[name]).norm() <= 2e-3 * gradient.norm(), name


def test_no_tensor_has_the_logits_of_all_tokens() -> None:
    """The largest tensor is the head's weight, 16 wide; logits of all 40 tokens would be larger."""
    student, head = program_of(seeded(llama))
    part, many = Trunk.of(student, {0: head}, "test"), ids(4, 10)
    sizes = {}
    for whole in (True, False):
        with Largest() as largest:
            (value,) = (student if whole else part).run([many])
            if whole:
                loss = distance("logits", value, value.detach(), None, 2.0)
            else:
                loss = vocabulary_loss(head, value, supervision(value, (head, value.detach())), elements=8 * WORDS)
            loss.backward()
        sizes[whole] = largest.elements
    assert sizes == {True: 40 * WORDS, False: WIDTH * WORDS}


def test_a_judged_loss_has_no_gradients() -> None:
    student, head = program_of(seeded(gemma))
    (hidden,) = Trunk.of(student, {0: head}, "test").run([ids()])
    with torch.no_grad():
        loss = vocabulary_loss(head, hidden, supervision(hidden, labels=ids()))
    assert not loss.requires_grad


def test_other_outputs_have_no_head() -> None:
    """Hidden states, a product of two values, and a head after which rows are mixed."""

    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.gain = torch.nn.Linear(8, 20), torch.nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self.head(x)
            return x + 1, logits.softmax(1), logits * x.sum(-1, keepdim=True), logits * self.gain, logits / 2

    program = captures.optimize(seeded(Mixed), normal(2, 5, 8)).program
    leaves = program.output.args[0]
    assert [lm_head_of(program, leaf) is not None for leaf in leaves] == [*itertools.repeat(False, 4), True]
