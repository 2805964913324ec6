"""`lissom::token_divergence`: kernel and reference against float64 and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lissom.compiler.verify.divergence import relative_error
from lissom.ops.divergence import token_divergence, token_divergence_reference
from lissom.ops.native import load_kernels

load_kernels()
# float32: a difference of logarithms about 5, each within 5e-7, times probabilities. bfloat16: the gradient has 8 bits.
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
BOTH = pytest.mark.parametrize("form", [token_divergence, token_divergence_reference], ids=["operator", "reference"])


def logits(*sizes, dtype=torch.float32, seed=0):
    return (3 * torch.randn(sizes, generator=torch.Generator().manual_seed(seed))).to(dtype)


def expected(student, teacher, shares, temperature):
    """The loss and its gradient in float64."""
    leaf = student.double().requires_grad_()
    log_q, log_p = (item.div(temperature).log_softmax(-1) for item in (leaf, teacher.double()))
    each = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    loss = temperature**2 * (each * shares.double()).sum()
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 300),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    dtypes=st.tuples(st.sampled_from(list(ALLOWED)), st.sampled_from(list(ALLOWED))),
    form=st.sampled_from([token_divergence, token_divergence_reference]),
)
def test_loss_and_gradient(rows, vocabulary, temperature, dtypes, form):
    student, teacher = (logits(rows, vocabulary, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes))
    shares = torch.rand(rows, generator=torch.Generator().manual_seed(2))
    loss, gradient = expected(student, teacher, shares, temperature)
    found, slopes = form(student, teacher, shares, temperature)
    assert (found.dtype, slopes.dtype, slopes.shape) == (torch.float32, dtypes[0], student.shape)
    assert abs(float(found) - loss) <= 1e-5 * max(1.0, loss)
    assert vocabulary == 1 or relative_error(gradient, slopes.double()) < ALLOWED[dtypes[0]]


@BOTH
def test_a_small_divergence(form):
    """A divergence of 1e-4 to a relative error of 1e-5, though the logarithms that it is a sum of are within 5e-7."""
    teacher, shares = logits(20, 1000), torch.ones(20)
    student = teacher + 0.005 * logits(20, 1000, seed=1)
    loss, _ = expected(student, teacher, shares, 1.0)
    assert loss / 20 < 2e-4
    assert float(form(student, teacher, shares, 1.0)[0]) == pytest.approx(loss, rel=1e-5)


@BOTH
def test_an_entry_that_the_teacher_excludes(form):
    teacher = logits(4, 37, seed=1)
    teacher[:, 5] = -torch.inf
    loss, gradient = form(logits(4, 37), teacher, torch.ones(4), 1.0)
    assert bool(loss.isfinite())
    assert bool((gradient[:, 5] > 0).all())


@BOTH
def test_a_logit_that_is_not_a_number_is_seen(form):
    student = logits(4, 37)
    student[1, 36] = torch.nan
    assert bool(form(student, logits(4, 37, seed=1), torch.ones(4), 1.0)[0].isnan())


def test_no_tokens():
    loss, gradient = token_divergence(logits(0, 7), logits(0, 7), torch.ones(0), 1.0)
    assert (float(loss), gradient.shape) == (0.0, (0, 7))


@pytest.mark.skipif(bool(load_kernels()), reason="there are no kernels")
@pytest.mark.parametrize(
    ("operands", "said"),
    [
        ((logits(4, 7), logits(4, 8), torch.ones(4)), "both must be"),
        ((logits(4, 7, 1), logits(4, 7, 1), torch.ones(4)), "both must be"),
        ((logits(4, 7), logits(4, 7), torch.ones(3)), "must have"),
        ((logits(4, 7).long(), logits(4, 7), torch.ones(4)), "floating"),
    ],
)
def test_operands_that_do_not_fit(operands, said):
    with pytest.raises(RuntimeError, match=said):
        token_divergence(*operands, 1.0)


def test_it_has_a_form_for_fake_tensors():
    operands = logits(4, 7), logits(4, 7, seed=1), torch.ones(4), 2.0
    torch.library.opcheck(token_divergence, operands, test_utils=("test_schema", "test_faketensor"))
