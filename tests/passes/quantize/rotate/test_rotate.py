"""Tests of rotate, and of its keys: equal outputs, keys in another basis, and less error of quantized keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lissom
from lissom.backends.base import Backend
from lissom.compiler.ir.node import is_state_write
from lissom.compiler.ir.program import Program
from lissom.compiler.pipeline.history import History
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.compiler.pipeline.spelling import parse_pipeline
from lissom.compiler.verify.divergence import run_samples
from lissom.compiler.verify.equality import require_equal
from lissom.errors import RequirementError, VerifyError
from lissom.frontends.generation.decoder import capture_decoder
from lissom.ops import change_basis
from lissom.passes import PASSES, RECIPES
from lissom.passes.quantize.rotate.bases import hadamard, random_basis
from lissom.passes.quantize.rotate.cache import KeyMoments
from lissom.passes.quantize.rotate.rotate import Rotate
from tests.support.decoders import DECODERS, ROTARY, decoder, prompt
from tests.support.harness import Calls, calls, check_golden, every_backend_but_eager_slow, rewrite
from tests.support.models import normal, seeded
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")


def rotated(name: str = "llama", *, data: bool = False, **options: str) -> tuple[Program, Program, History]:
    captured = capture_decoder(decoder(name), max_length=16)
    # Soft-capped scores, and those that baddbmm computes, are no attention before they are raised to one.
    before = raised(captured.program) if name in ("gemma2", "bloom") else captured.program
    pipeline = Pipeline([Rotate(**options)], samples=captured.samples, data=captured.samples if data else ())  # pyright: ignore
    return before, *pipeline.run(before)


def raised(program: Program) -> Program:
    return Pipeline(parse_pipeline("exact", PASSES, RECIPES), checks="off").run(program)[0]


def keys_after(program: Program, state: str) -> torch.Tensor:
    """The rows that a call writes to a state."""
    with torch.no_grad():
        program.run([prompt()["input_ids"], torch.ones(1, 16, dtype=torch.int64), torch.arange(7)[None], torch.tensor([0])])
    return program.weight(state)[:, :, :7].double()


def test_rewrites() -> None:
    _, _, history = rotated()
    check_golden("rotate", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(Rotate(), Calls(lambda x: x.relu()), normal(2, 4))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].notes == ("the program has no KV cache in floating point; compile_generation makes one",)


class Projected(nn.Module):
    """The cache holds latents, from which keys are projected again for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 4), nn.Linear(4, 8)
        self.register_buffer("latents", torch.zeros(1, 1, 16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latents = self.latents.index_copy(2, torch.arange(x.shape[2]), self.down(x))
        self.latents.copy_(latents)
        keys = self.up(latents)
        return nn.functional.scaled_dot_product_attention(x, keys, keys)


def test_a_cache_that_holds_no_keys_is_reported() -> None:
    _, history = rewrite(Rotate(), seeded(Projected), normal(1, 1, 5, 8))
    assert history.texts[0] == history.texts[1]
    (note,) = history.steps[1].notes
    assert note.startswith("no keys are rotated: attentions read other values than the KV cache holds, as in latent attention")


@pytest.mark.parametrize("name", all_but_slow(list(DECODERS), "qwen3", "gpt2"))
def test_keys_are_rotated_where_they_are_written(name: str) -> None:
    before, after, _ = rotated(name)
    basis = hadamard(8)
    assert basis is not None
    # Where no rotary embedding or norm is between, it costs nothing.
    assert calls(after, change_basis) == (4 if name in ROTARY else 0)
    wanted = keys_after(before, "cache.0.keys") @ basis
    # Sums of eight products in float32.
    found = keys_after(after, "cache.0.keys_rotated")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_random_basis_where_there_is_no_hadamard_matrix() -> None:
    before, after, _ = rotated(basis="random")
    wanted = keys_after(before, "cache.0.keys") @ random_basis(8, 0)
    found = keys_after(after, "cache.0.keys_rotated")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", all_but_slow(list(DECODERS), "gemma3", "gemma2"))
def test_balanced_keys_are_read_as_before(name: str) -> None:
    """The pipeline compares the outputs; a soft cap of the scores, as in Gemma 2, forbids the shift."""
    _, after, history = rotated(name, data=True)
    assert history.steps[1].relative_error is not None and history.steps[1].relative_error < 2e-6
    assert calls(after, change_basis) == 4
    assert sum("shift" in weight for weight in after.weights()) == (0 if name == "gemma2" else 2)


def test_moments_count_keys_by_their_attention() -> None:
    queries, keys, weights = normal(4, 5, 3), normal(2, 7, 3, seed=1), normal(4, 5, 7, seed=2).softmax(-1)
    found = KeyMoments.empty(2, 3)
    found.add(queries, keys, weights)
    mean, second = found.moments()
    for group in range(2):
        mass = [float(sum(weights[2 * group + h, q, t] for h in range(2) for q in range(5))) for t in range(7)]
        wanted = sum(mass[t] * keys[group, t].double() for t in range(7)) / sum(mass)
        square = sum(mass[t] * torch.outer(keys[group, t], keys[group, t]).double() for t in range(7)) / sum(mass)
        rows = queries[2 * group : 2 * group + 2].double().flatten(0, 1)
        # Sums of weights in float32.
        torch.testing.assert_close(mean[group], wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(second[group], square, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.queries[group], sum(torch.outer(row, row) for row in rows), rtol=1e-9, atol=1e-12)


def test_what_is_kept_already_is_rotated() -> None:
    captured = capture_decoder(decoder("llama"), max_length=16)
    program = captured.program
    with torch.no_grad():
        program.run(captured.samples[0])
    wanted = program.weight("cache.0.keys").double().clone()
    after, _ = Pipeline([Rotate()], samples=captured.samples).run(program)
    basis = hadamard(8)
    assert basis is not None and wanted.any()
    torch.testing.assert_close(after.weight("cache.0.keys_rotated").double(), wanted @ basis, rtol=1e-4, atol=1e-5)


def test_requirements() -> None:
    with pytest.raises(RequirementError) as refusal:
        rotated(basis="balanced")
    assert str(refusal.value) == "rotate{basis=balanced} needs calibration data: pass data=, or choose basis=hadamard"


@every_backend_but_eager_slow
@pytest.mark.parametrize("data", [False, True])
def test_composes(backend: Backend, data: bool, tmp_path: Path) -> None:
    if backend.name == "inductor":
        pytest.skip("Inductor keeps no state")
    model, ids = decoder("gemma3"), prompt(length=9)["input_ids"]
    exact, given = "rotate,rotate{where=heads}", [ids] if data else ()
    passes = f"{exact},quantize-cache{{bits=4}}"
    fast = lissom.compile_generation(model, max_length=32, passes=passes, backend=backend, goal=None, data=given)
    plain = lissom.compile_generation(model, max_length=32, passes=exact, goal=None, data=given)
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    # Exact, then four bits for keys and values.
    assert float((plain.step(ids) - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert float((fast.step(ids) - wanted).norm() / wanted.norm()) < 0.4
    fast.save(tmp_path / "saved")
    again = lissom.load_generation(tmp_path / "saved")
    fast.reset()
    assert torch.equal(again.step(ids), fast.step(ids))


def test_renamed_state_must_be_written() -> None:
    before, program, _ = rotated()
    dropped = program.copy()
    dropped.graph.erase_node(next(filter(is_state_write, dropped.nodes())))
    samples = [[prompt()["input_ids"], torch.ones(1, 16, dtype=torch.int64), torch.arange(7)[None], torch.tensor([0])]]
    wanted, actual = (run_samples(each, samples) for each in (before, dropped))
    with pytest.raises(VerifyError) as refusal:
        require_equal(before, dropped, samples, wanted, actual)
    assert str(refusal.value) == "it writes 3 of the 4 states that the program before it writes"
