"""Tests of lissom.frontends.capture.recurrences: unrolled recurrences become operators, and nothing else changes."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import transformers
from torch import nn

import lissom
from lissom.compiler.verify.divergence import relative_error
from lissom.errors import CaptureError
from lissom.frontends.capture.export import capture
from lissom.frontends.capture.recurrences import recurrences_as_operators
from lissom.ops import gated_delta_rule, selective_scan
from lissom.ops.recurrences import selective_scan_reference
from tests.support.decoders import RECURRENT, decoder
from tests.support.models import normal, seeded
from tests.support.neighbours import all_but_slow

modeling = transformers.models.qwen3_next.modeling_qwen3_next


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2))


@pytest.mark.parametrize(
    ("build", "operator", "count"),
    [
        (lambda: decoder("qwen3_next"), gated_delta_rule, 1),
        (lambda: decoder("mamba2"), selective_scan, 2),
        (lambda: seeded(mamba).eval(), selective_scan, 2),
    ],
)
def test_a_recurrence_is_one_node_of_any_length(build, operator, count: int) -> None:
    model = build()
    example = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(0))
    model.config.use_cache = False
    program = capture(model, (), {"input_ids": example}).program
    assert len(program.nodes(operator)) == count
    assert len(program.nodes()) < 400  # the loops over the tokens of a chunk are thousands
    for length in (1, 70, 130):
        ids = torch.randint(3, 99, (3, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            # Sums of some hundred products in float32, through two layers.
            assert relative_error(model(ids).logits, program.run([ids])[0]) < 2e-5


def test_functions_are_themselves_again_also_after_an_error() -> None:
    own = modeling.torch_chunk_gated_delta_rule
    with pytest.raises(ZeroDivisionError), recurrences_as_operators(decoder("qwen3_next")):
        assert modeling.torch_chunk_gated_delta_rule is not own
        raise ZeroDivisionError
    assert modeling.torch_chunk_gated_delta_rule is own


def test_other_threads_call_the_model_s_own_functions_meanwhile() -> None:
    model = decoder("qwen3_next")
    ids = torch.randint(3, 99, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
    found: list[torch.Tensor] = []
    with recurrences_as_operators(model):
        thread = threading.Thread(target=lambda: found.append(model(ids).logits.detach()))
        thread.start()
        thread.join()
    assert torch.equal(found[0], wanted)


def test_program_for_another_device_keeps_model_s_functions() -> None:
    own = modeling.torch_chunk_gated_delta_rule
    with recurrences_as_operators(decoder("qwen3_next"), torch.device("cuda")):
        assert modeling.torch_chunk_gated_delta_rule is own


def torch_chunk_gated_delta_rule(something: torch.Tensor) -> torch.Tensor:
    """Named like a function that is known, but not that function."""
    return something * 2


def test_a_function_that_computes_something_else_is_found_out(monkeypatch) -> None:
    own = modeling.torch_chunk_gated_delta_rule

    @functools.wraps(own)
    def changed(*args, **kwargs):
        found, state = own(*args, **kwargs)
        return found * 1.001, state

    monkeypatch.setattr(modeling, "torch_chunk_gated_delta_rule", changed)
    model = decoder("qwen3_next")
    model.config.use_cache = False
    with pytest.raises(CaptureError, match=r"torch_chunk_gated_delta_rule and the operator for it differ by 0\.001 relative"):
        capture(model, (), {"input_ids": torch.ones(1, 5, dtype=torch.int64)})


def test_operator_that_rounds_less_than_function_is_kept() -> None:
    """The function subtracts sums of decays over all tokens, here 5,000, from each other; 6e-8 of it are 3e-4."""
    scan = transformers.models.mamba2.modeling_mamba2.mamba2_chunk_scan
    model = decoder("mamba2")
    x, b, c, rates = normal(1, 12, 4, 16), normal(1, 12, 2, 8), normal(1, 12, 2, 8), -normal(4).abs() - 1
    steps = torch.full((1, 12, 4), 0.03)
    steps[:, :6] = 900.0
    given = {"chunk_size": 8, "return_final_states": True}
    _, rounded = scan(x, steps, rates, b, c, **given)
    with recurrences_as_operators(model):
        _, found = transformers.models.mamba2.modeling_mamba2.mamba2_chunk_scan(x, steps, rates, b, c, **given)
    _, exact = selective_scan_reference(*(item.double() for item in (x, steps, rates, b, c)))
    assert relative_error(exact, rounded.double()) > 2e-5
    assert relative_error(exact, found.double()) < 2e-6


def test_a_decode_step_of_mamba_2_overwrites_its_state() -> None:
    model = decoder("mamba2")
    step = transformers.models.mamba2.modeling_mamba2.mamba2_selective_state_update
    x, dt, a, b = (
        normal(2, 4, 16),
        normal(2, 4, 1).expand(-1, -1, 16),
        -normal(4, 1, 1).abs().expand(-1, 16, 8),
        normal(2, 2, 8),
    )
    own, ours = normal(2, 4, 16, 8), normal(2, 4, 16, 8)
    wanted = step(own, x, dt, a, b, b, dt_softplus=True, z=x)
    with recurrences_as_operators(model):
        exchanged = transformers.models.mamba2.modeling_mamba2.mamba2_selective_state_update
        assert exchanged is not step
        found = exchanged(ours, x, dt, a, b, b, dt_softplus=True, z=x)
    # Sums of eight products in another order.
    assert relative_error(wanted, found) < 1e-6
    assert relative_error(own, ours) < 1e-6


class Other(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch_chunk_gated_delta_rule(x)


def test_a_function_with_other_parameters_stays() -> None:
    x = torch.ones(2, 3)
    assert torch.equal(lissom.compile(Other(), x)(x), 2 * x)


@pytest.mark.parametrize("dtype", all_but_slow([torch.bfloat16, torch.float64], torch.bfloat16))
@pytest.mark.parametrize(
    "build", all_but_slow([mamba, *RECURRENT.values()], mamba, *(RECURRENT[name] for name in ("mamba", "mamba2", "lfm2")))
)
def test_models_of_other_dtypes(build, dtype: torch.dtype) -> None:
    model = seeded(build).eval().to(dtype)
    model.config.use_cache = False
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = lissom.compile(model, {"input_ids": ids}, checks="off")
    with torch.no_grad():
        assert compiled(input_ids=ids)["logits"].dtype == model(ids).logits.dtype


@pytest.mark.parametrize("name", ["mamba2", pytest.param("falcon_h1", marks=pytest.mark.slow)])
def test_a_decoder_in_bfloat16(name: str) -> None:
    model = decoder(name).to(torch.bfloat16)
    fast = lissom.compile_generation(model, max_length=16)
    ids = torch.randint(3, 99, (1, 9), generator=torch.Generator().manual_seed(0))
    # Two layers in bfloat16, whose sums round to 8 bits.
    assert relative_error(model(ids).logits[:, -1].float(), fast.step(ids).float()) < 5e-2


def test_low_precision_stays_low(tmp_path) -> None:
    model = decoder("olmo_hybrid").to(torch.bfloat16)
    model.config.use_cache = False
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    compiled = lissom.compile(model, {"input_ids": ids})
    compiled.save(tmp_path / "model")
    loaded = lissom.load(tmp_path / "model")
    with torch.no_grad():
        wanted = model(ids).logits
    found = loaded(input_ids=ids)["logits"]
    assert found.dtype == torch.bfloat16
    # Two layers in bfloat16, whose sums round to 8 bits.
    assert relative_error(wanted.float(), found.float()) < 5e-2
