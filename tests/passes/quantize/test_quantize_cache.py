"""Tests of quantize-cache."""

from __future__ import annotations

import pytest
import torch

import lissom
from lissom.compiler.pipeline.pipeline import Pipeline
from lissom.frontends.generation.decoder import capture_decoder
from lissom.ops import fused_attention
from lissom.ops.formats import FORMATS, unpack_halves
from lissom.ops.native import load_kernels
from lissom.ops.quantization import dequantize
from lissom.passes.quantize.quantize_cache import QuantizeCache, quantize_rows
from tests.support.decoders import decoder, prompt
from tests.support.harness import Calls, aten, calls, check_golden, rewrite
from tests.support.models import normal
from tests.support.neighbours import all_but_slow

pytestmark = pytest.mark.usefixtures("shared_captures")


class _Cache(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(1, 2, 4, 128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept.index_copy(2, torch.arange(3), x)
        self.kept.copy_(kept)
        return kept.sum(-1)


def quantized(name: str = "llama", bits: int = 8, **options: object):
    captured = capture_decoder(decoder(name), max_length=16, **options)
    return captured.program, *Pipeline([QuantizeCache(bits)], samples=captured.samples).run(captured.program)


def test_rewrites() -> None:
    _, _, history = quantized()
    check_golden("quantize_cache", history.diff(0, 1))


def test_leaves_other_graphs_alone() -> None:
    _, history = rewrite(QuantizeCache(), Calls(lambda x: x.relu()), normal(2, 4))
    assert history.texts[0] == history.texts[1]
    assert history.steps[1].notes == ("the program has no KV cache; compile_generation makes one that has",)


@pytest.mark.parametrize("bits", all_but_slow([8, 4], 8))
@pytest.mark.parametrize("name", all_but_slow(["llama", "gpt2"], "llama"))
def test_numbers(name: str, bits: int) -> None:
    before, after, _ = quantized(name, bits, batch=2)
    ids = prompt(2)["input_ids"]
    inputs = [ids, torch.ones(2, 16, dtype=torch.int64), torch.arange(7).expand(2, 7), torch.tensor([0])]
    with torch.no_grad():
        before.run(inputs)
        after.run(inputs)
    # Half a step of each row's own; in four bits, a step for what lies at the end that the largest element does not.
    steps = {8: 0.5 / 127, 4: 1 / 8}[bits]
    for state in before.state[:2]:  # what later layers keep comes from rounded values
        kept, scale = after.weight(f"{state}_int{bits}"), after.weight(f"{state}_scale")
        found = dequantize(kept, scale, format=f"int{bits}", dtype=torch.float64)
        wanted = before.weight(state).double()
        # And what is lost in float32; rows not written yet stay zero.
        assert bool(((found - wanted).abs() <= wanted.abs().amax(-1, keepdim=True) * steps + 1e-5).all())
        assert not found[:, :, 7:].any()


def test_four_bits_have_a_scale_per_group_and_use_the_lowest_integer() -> None:
    rows = normal(1, 2, 3, 128)
    rows[0, 0, 0, :64] *= 100  # an outlier's group, which the other group does not feel
    rows[0, 1, 1] = 0
    history = rewrite(QuantizeCache(4, group=64), _Cache(), rows)[1]
    assert "@kept_scale: f32[1, 2, 4, 2] state" in history.texts[-1]
    model = _Cache()
    program = rewrite(QuantizeCache(4, group=64), model, rows)[0]
    with torch.no_grad():
        program.run([rows])
    packed, scale = program.weight("kept_int4"), program.weight("kept_scale")
    whole = unpack_halves(packed, FORMATS["int4"])[:, :, :3].float().unflatten(-1, (2, 64))
    written = rows.unflatten(-1, (2, 64))
    assert (whole.amin(-1) == -8).sum() == 2 * 3 * 2 - 2  # all groups but those of the row of zeros
    step = scale[:, :, :3, :, None]
    error = (whole * step - written).abs()
    assert bool((error <= 0.5001 * step.abs() + 1e-6)[whole < 7].all())
    assert bool((error <= 1.0001 * step.abs() + 1e-6).all())
    # What the pass itself quantizes, before the first call, is quantized alike.
    found, its_scale = quantize_rows(rows, FORMATS["int4"], 2)
    assert torch.equal(found, packed[:, :, :3])
    torch.testing.assert_close(
        its_scale[0, :, :, :].abs(), scale[0, :, :3].abs().where(its_scale[0].abs() > 0, 0), rtol=1e-6, atol=0
    )


def test_heads_that_a_group_does_not_divide_have_one_scale() -> None:
    _, _, history = quantized("llama", 4)  # heads of 8 features
    assert "@cache.0.keys_scale: f32[1, 2, 16, 1] state" in history.texts[-1]


@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.02), pytest.param(4, 0.4, marks=pytest.mark.slow)])
def test_cached_values_of_tokens_do_not_change_later(bits: int, allowed: float) -> None:
    fast = lissom.compile_generation(decoder("llama"), max_length=32, passes=f"quantize-cache{{bits={bits}}}", goal=None)
    ids = prompt(length=9)["input_ids"]
    at_once = fast.step(ids)
    fast.reset()
    for place in range(9):
        one_by_one = fast.step(ids[:, place : place + 1])
    # Products of one row and of nine sum in another order, and may round a value the other way.
    assert (one_by_one - at_once).abs().max() < allowed * at_once.abs().max()
    with torch.no_grad():
        wanted = decoder("llama")(ids).logits[:, -1]
    assert (at_once - wanted).abs().max() < allowed * wanted.abs().max()


def test_the_notes_say_what_the_cache_takes() -> None:
    _, _, history = quantized()
    # 4 states of 2 heads and 16 tokens: 8 features of 4 bytes, or of 1 byte and a scale of 4.
    assert history.steps[1].notes == ("the cache takes 0.00154 MB, and took 0.0041 MB",)


@pytest.mark.slow
@pytest.mark.skipif(bool(load_kernels()), reason="there are no kernels here")
def test_composes_with_attention_on_bytes_and_in_place_writes() -> None:
    program = lissom.compile_generation(decoder("llama"), max_length=32, passes="quantize-cache", goal=None).program
    assert calls(program, dequantize) == 0
    assert all(
        "k_scale" in node.kwargs and node.args[1].meta["val"].dtype == torch.int8 for node in program.nodes(fused_attention)
    )
    assert calls(program, aten.index_copy_.default) == len(program.state) == 8


def test_what_is_kept_already_is_kept() -> None:
    captured = capture_decoder(decoder("llama"), max_length=16)
    program = captured.program
    with torch.no_grad():
        program.run(captured.samples[0])
    wanted = {name: program.weight(name).clone() for name in program.state}
    after, _ = Pipeline([QuantizeCache()], samples=captured.samples).run(program)
    for name, kept in wanted.items():
        found = dequantize(after.weight(f"{name}_int8"), after.weight(f"{name}_scale"), format="int8", dtype=torch.float32)
        # Half a step, of which there are 127 to the largest of a row.
        assert kept.any() and bool(((found - kept).abs() <= kept.abs().amax(-1, keepdim=True) / 250).all())
