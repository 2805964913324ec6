"""`lissom::change_basis` against sums written out, with one basis and one per key head, its gradient, every backend."""

from __future__ import annotations

import pytest
import torch

from lissom.backends.base import Backend
from lissom.compiler.verify.divergence import relative_error
from lissom.ops import change_basis
from tests.support import captures
from tests.support.harness import Calls, calls, every_backend
from tests.support.models import normal


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 5, 3)])
def test_numbers(shape: tuple[int, ...]) -> None:
    x, basis = normal(*shape).double(), normal(3, 7, seed=1).double()
    wanted = sum(x[..., i, None] * basis[i] for i in range(3))
    # Sums of three terms in float64, in another order.
    torch.testing.assert_close(change_basis(x, basis), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_query_heads_take_the_basis_of_their_key_head(key_heads: int) -> None:
    x, basis = normal(2, 4, 5, 3).double(), normal(key_heads, 3, 3, seed=1).double()
    wanted = torch.stack([x[:, head] @ basis[head // (4 // key_heads)] for head in range(4)], 1)
    torch.testing.assert_close(change_basis(x, basis), wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("basis", [(3, 3), (2, 3, 3)])
def test_gradients_flow(basis: tuple[int, ...]) -> None:
    x, basis_values = normal(2, 4, 5, 3).double().requires_grad_(), normal(*basis, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(change_basis, (x, basis_values))


@every_backend
@pytest.mark.parametrize("basis", [(3, 3), (2, 3, 3)])
def test_every_backend(backend: Backend, basis: tuple[int, ...]) -> None:
    x, model = normal(2, 4, 5, 3), Calls(lambda self, x: change_basis(x, self.basis), basis=normal(*basis, seed=1))
    fast = captures.compile(model, x, backend=backend)
    assert calls(fast.program, change_basis) == 1
    # One product of float32.
    assert relative_error(model(x), fast(x)) < 1e-6
