"""`lissom::squared_relu` against max(x, 0)² number by number, what follows from its declaration, and its gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import NemotronConfig, NemotronForCausalLM

from lissom.artifacts.program_text import parse_program
from lissom.backends.base import Backend
from lissom.compiler.ir.operators import is_activation, is_pointwise
from lissom.compiler.verify.divergence import relative_error
from lissom.ops import squared_relu
from tests.support import captures
from tests.support.harness import Calls, aten, calls, every_backend, simulates
from tests.support.models import seeded

SPECIAL = [-torch.inf, -3.0, -0.0, 0.0, 1e-30, 0.5, 3.0, torch.inf]


def test_numbers() -> None:
    x = torch.tensor(SPECIAL, dtype=torch.float64)
    assert squared_relu(x).tolist() == [number * number if number > 0 else 0.0 for number in SPECIAL]
    assert squared_relu(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    assert squared_relu(torch.ones(2, dtype=dtype)).dtype == dtype


def test_gradients_flow() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(squared_relu, x)


def test_it_is_an_activation_by_its_declaration() -> None:
    (node,) = parse_program("program P(x: f32[2]) {\n  %y: f32[2] = lissom.squared_relu(%x)\n  return [%y]\n}\n").nodes()
    assert is_pointwise(node)
    assert is_activation(node)


@every_backend
def test_every_backend(backend: Backend) -> None:
    x = torch.tensor([SPECIAL[1:-1]])
    fast = captures.compile(Calls(squared_relu), x, backend=backend)
    assert torch.equal(fast(x), squared_relu(x))


def nemotron() -> NemotronForCausalLM:
    sizes = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return NemotronForCausalLM(NemotronConfig(**sizes, **tokens, num_key_value_heads=2, hidden_act="relu2")).eval()


# Sums in another order; eight bits a weight and an activation; what 32 of 128 random neurons add.
ALLOWED = {"exact": 1e-5, "exact,quantize": 0.05, "exact,prune-neurons{keep=0.75}": 0.5}
ON_EVERY_BACKEND = [
    pytest.param(
        *(*backend.values, passes, allowed),
        id=f"{backend.id}-{passes}-{allowed}",
        marks=[*backend.marks, *([pytest.mark.slow] if backend.id != "eager" and passes != "exact,quantize" else [])],
    )
    for backend in every_backend.args[1]
    for passes, allowed in ALLOWED.items()
]


@pytest.mark.parametrize(("backend", "passes", "allowed"), ON_EVERY_BACKEND)
def test_nemotron(backend: Backend, passes: str, allowed: float) -> None:
    model, ids = seeded(nemotron), torch.arange(32).reshape(2, 16) + 3
    fast = captures.compile(model, ids, passes=passes, backend=backend, simulate=simulates(backend))
    fused = [node for node in fast.program.nodes() if node.kwargs.get("activation") == "squared_relu"]
    assert len(fused) + calls(fast.program, squared_relu) == 2
    assert calls(fast.program, aten.relu.default, aten.square.default) == 0
    assert relative_error(model(ids).logits, fast(ids).logits) < allowed
